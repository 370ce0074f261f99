"""Boxes lie on their pixels after every change, what is drawn is the image's own, and what ends ends in time."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.data.largest import LargestImages
from d3etr_hf.data.sampling import TrainingSample, TrainingSampler, drawing_from
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.data.strong_augmentation import (
    Mosaic,
    StrongAugmentation,
    cropped_by_overlap,
    distorted,
    zoomed_out,
)
from d3etr_hf.data.transforms import Augmentation
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.tiny import small_image_processor

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
BOXES = [[10, 8, 40, 30], [60, 20, 90, 70], [20, 50, 50, 75], [95, 5, 118, 45]]


def scene(boxes=BOXES, colors=COLORS, size=(120, 80)):
    """A black image with rectangles, each of a colour of its own, whose labels say of which."""
    image = Image.new("RGB", size)
    for box, color in zip(boxes, colors, strict=True):
        ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=color)
    labels = torch.tensor([COLORS.index(color) for color in colors])
    return image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels


def measured(image, color, tolerance=60):
    """xyxy in pixels of where an image has a colour, read pixel by pixel."""
    difference = np.abs(np.asarray(image).astype(int) - color).max(-1)
    rows, columns = np.nonzero(difference < tolerance)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


def assert_on_their_pixels(image, boxes, labels, atol=0.01):
    """Clipped to the image, as `Augmentation` leaves them."""
    clipped = torch.minimum(boxes.clamp(min=0), torch.tensor([image.width, image.height] * 2))
    for box, label in zip(clipped, labels, strict=True):
        np.testing.assert_allclose(measured(image, COLORS[label]), box, atol=atol)


@pytest.mark.parametrize("seed", range(12))
def test_zooming_out_moves_boxes_with_their_pixels(seed):
    torch.manual_seed(seed)
    image, boxes = zoomed_out(*scene()[:2])
    assert_on_their_pixels(image, boxes, range(4))
    assert 1 <= image.width / 120 < 4 and abs(image.width / 120 - image.height / 80) < 0.02
    assert torch.equal(boxes[:, 2:] - boxes[:, :2], scene()[1][:, 2:] - scene()[1][:, :2])


def test_crops_keep_boxes_on_their_pixels_and_drop_those_whose_centre_is_out():
    sizes, kept = set(), Counter()
    for seed in range(80):
        torch.manual_seed(seed)
        original = scene()
        image, boxes, labels = cropped_by_overlap(*original)
        assert_on_their_pixels(image, boxes, labels)
        assert len(boxes) and 0.5 <= image.width / image.height <= 2 and image.width >= 36 and image.height >= 24
        sizes.add(image.size)
        kept[len(boxes)] += 1
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert (centres > 0).all() and (centres < torch.tensor(image.size)).all()
        for label in set(range(4)) - set(labels.tolist()):  # gone: less than half of it can be seen along some axis
            seen, box = measured(image, COLORS[label]), BOXES[label]
            assert seen is None or (
                2 * (seen[2] - seen[0]) <= box[2] - box[0] or 2 * (seen[3] - seen[1]) <= box[3] - box[1]
            )
    assert len(sizes) > 40 and len(kept) == 4
    unboxed = scene([], [])
    assert cropped_by_overlap(*unboxed)[0] is unboxed[0]


def test_colors_change_and_nothing_moves():
    image, gray = scene()[0], Image.new("RGB", (40, 40), (90, 120, 150))
    changed = []
    for seed in range(40):
        torch.manual_seed(seed)
        found = distorted(gray)
        assert found.size == gray.size and found.mode == "RGB"
        changed.append(np.asarray(found)[0, 0].tolist())
        torch.manual_seed(seed)
        colors = distorted(image)
        dark = np.asarray(image).max(-1) == 0
        levels = np.asarray(colors).max(-1)
        assert levels[dark].max() < levels[~dark].min()  # the rectangles stand where they stood
    assert len({tuple(color) for color in changed}) > 30 and [90, 120, 150] in changed
    means = np.array(changed).mean(0)
    np.testing.assert_allclose(means, [90, 120, 150], atol=12)  # and on the whole they stay what they were


def test_the_whole_recipe_keeps_boxes_inside_and_on_their_pixels():
    augmentation = StrongAugmentation(short_sides=[80], long_side=160)
    counts = Counter()
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes, labels = augmentation(*scene(BOXES[:3], COLORS[:3]))
        counts[len(boxes)] += 1
        pixels = np.asarray(image).astype(int)
        for box, label in zip(boxes, labels, strict=True):
            # whatever became of the colours, a rectangle is brightest in its own channel; the canvas is grey
            others = [channel for channel in range(3) if channel != label]
            shows = pixels[..., label] - pixels[..., others].max(-1) > 40
            rows, columns = np.nonzero(shows)
            np.testing.assert_allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], box, atol=0.01)
    assert len(counts) >= 3


@pytest.mark.parametrize("seed", range(6))
def test_a_mosaic_has_four_images_boxes_on_their_pixels(seed):
    torch.manual_seed(seed)
    sizes = [(120, 80), (120, 80), (60, 100), (300, 90)]
    images = [scene([[16, 20, 48, 60]], [color], size) for color, size in zip(COLORS, sizes, strict=True)]
    image, boxes, labels = Mosaic(1.0)(images[0], lambda row: images[1 + row % 3], 900, 0.0)
    assert image.size == (120, 80) and len(boxes) == 4
    assert labels[0] == 0
    for box, label in zip(boxes, labels, strict=True):
        column, row = ((box[:2] + box[2:]) / 2).tolist()
        quarter = image.crop((60 * (column > 60), 40 * (row > 40), 60 + 60 * (column > 60), 40 + 40 * (row > 40)))
        found = torch.tensor(measured(quarter, COLORS[label], 128), dtype=torch.float32)
        found += torch.tensor([60 * (column > 60), 40 * (row > 40)] * 2)
        np.testing.assert_allclose(found, box, atol=1.01)
    quarters = {(bool((box[0] + box[2]) > 120), bool((box[1] + box[3]) > 80)) for box in boxes}
    assert len(quarters) == 4


def test_boxes_of_narrow_images_fill_their_places_in_a_mosaic():
    """Of 100×3 pixels a place of 20×20 shows 20×1: another factor in width than in height."""
    narrow = Image.new("RGB", (100, 3), "red"), torch.tensor([[0.0, 0, 100, 3]]), torch.zeros(1, dtype=torch.int64)
    blank = Image.new("RGB", (40, 40)), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    _, boxes, _ = Mosaic(1.0)(blank, lambda row: narrow, 3, 0.0)
    assert boxes.tolist() == [[20, 19, 40, 20], [0, 20, 20, 21], [20, 20, 40, 21]]


def test_the_hue_goes_round():
    """Guards red, whose neighbours are at both ends of the hues."""
    found = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found.add(np.asarray(distorted(Image.new("RGB", (2, 2), "red")).convert("HSV"))[0, 0, 0] > 128)
    assert found == {False, True}


def test_mosaics_are_drawn_as_often_as_asked_and_end():
    def drawn(mosaic, progress):
        return mosaic(scene(), lambda row: scene([[1, 1, 9, 9]], COLORS[:1]), 5, progress)[1]

    torch.manual_seed(0)
    assert 20 < sum(len(drawn(Mosaic(0.3, 0.5), 0.49)) > 4 for _ in range(100)) < 40
    assert all(len(drawn(Mosaic(1.0, 0.5), progress)) == 4 for progress in (0.5, 0.75, 1.0))
    strong = StrongAugmentation(end=0.75, short_sides=[40], long_side=80)
    assert strong.at(0.74) is strong and type(strong.at(0.75)) is Augmentation
    assert strong.at(0.75).draw_size() == {"shortest_edge": 40, "longest_edge": 80}


@pytest.mark.parametrize(
    ("images", "batch", "accumulated", "drop_last", "steps_an_epoch"),
    [(10, 3, 1, False, 4), (10, 3, 1, True, 3), (10, 2, 2, False, 3), (5, 5, 1, False, 1)],
)
def test_progress_is_the_share_of_steps(images, batch, accumulated, drop_last, steps_an_epoch):
    sampler = TrainingSampler(range(images), 0, True, batch, accumulated, drop_last=drop_last)
    assert {sample.progress for sample in sampler} == {0.0}
    sampler.total_steps = 12
    for epoch in (0, 2):
        sampler.set_epoch(epoch)
        samples = list(sampler)
        assert samples[0].progress == epoch * steps_an_epoch / 12
        expected = [(epoch * steps_an_epoch + place // (batch * accumulated)) / 12 for place in range(images)]
        assert [sample.progress for sample in samples] == expected


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 10, 3, image_size=SIDE, progress=False)


def strong_data(shapes, **options):
    data = DataArguments(data_folder=str(shapes), augmentation="strong", mosaic=0.5, **options)
    return load_splits(data, small_image_processor(short_side=SIDE, long_side=2 * SIDE))


def test_what_is_drawn_belongs_to_the_image_and_the_epoch(shapes):
    train, val = strong_data(shapes)
    samples = [TrainingSample(index, 3, epoch, 0) for index in range(10) for epoch in range(2)]
    first = [train[sample]["pixel_values"] for sample in samples]
    torch.manual_seed(5)
    for sample, pixels in reversed(list(zip(samples, first, strict=True))):
        assert train[sample]["pixel_values"].equal(pixels)
    assert not any(one.equal(other) for one, other in zip(first[::2], first[1::2], strict=True))
    with drawing_from(0):
        plain = train[2]["labels"]  # outside of training there are no mosaics
    assert len(plain["boxes"]) <= len(train.rows[2]["boxes"])
    assert val[0]["pixel_values"].shape == (3, SIDE, SIDE) and val.mosaic is None
    assert LargestImages(train).objects == 4 * max(map(len, train.rows["class_labels"]))
    largest = LargestImages(train).sides(2)
    assert all(pixels.shape[1] <= largest[0] and pixels.shape[2] <= largest[1] for pixels in first)


def test_training_ends_its_mosaics_and_goes_on_bit_by_bit(shapes, tmp_path, monkeypatch):
    """The trainer says how far the training is, after an interruption too."""
    seen = []
    ask = Mosaic.__call__

    def watched(self, first, others, images, progress):
        seen.append(progress)
        return ask(self, first, others, images, progress)

    monkeypatch.setattr(Mosaic, "__call__", watched)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    train = strong_data(shapes, mosaic_end_fraction=0.4)[0]
    whole = shapes_trainer(shapes, tmp_path, train=train, **options)
    whole.train()
    assert sorted(set(seen)) == [step / 8 for step in range(10)][: len(set(seen))] and max(seen) >= 7 / 8
    resumed = shapes_trainer(shapes, tmp_path, train=train, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mosaic": 1.5}, "mosaic is 1.5: it must be from 0 to 1"),
        ({"mosaic": 0.5, "augmentation": "none"}, "mosaic is 0.5, and augmentation none"),
        ({"mosaic_end_fraction": 0.2}, "mosaic_end_fraction has no effect without mosaic above 0"),
        ({"strong_end_fraction": 0.2}, "strong_end_fraction has no effect without augmentation strong"),
        ({"strong_end_fraction": -0.2, "augmentation": "strong"}, "must be from 0 to 1"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(data_folder="data", **options)
