"""The largest batch by its annotations, against what augmentation draws again and again."""

import pytest
import torch
from transformers import ConditionalDetrImageProcessorPil, RTDetrImageProcessorPil

from d3etr_hf.data import Augmentation, CropSizes, DetectionCollator, DetectionTransform, load_coco_split
from d3etr_hf.data.largest import LargestImages
from d3etr_hf.data.sampling import TrainingSample
from d3etr_hf.data.transforms import random_region, resized_size
from tests.data.coco_files import annotation, coco, write_split

SHAPES = [(240, 160), (160, 240), (200, 200), (360, 120)]
OBJECTS = [1, 5, 0, 2]
SHORT = ConditionalDetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 80})
SQUARE = RTDetrImageProcessorPil(size={"height": 40, "width": 40})
CROP = CropSizes((120, 144), 80, 144)
TRANSFORMS = {
    "plain": DetectionTransform(SHORT),
    "multiscale": DetectionTransform(SHORT, Augmentation([20, 28, 48], 100)),
    "crop": DetectionTransform(SHORT, Augmentation([20, 28, 48], 100, CROP)),
    "squares": DetectionTransform(SQUARE, Augmentation(crop=CROP, batch_sizes=[(24, 24), (48, 48)])),
    "a teacher of squares": DetectionTransform(SHORT, Augmentation([20, 28, 48], 100, CROP), SQUARE),
    "a teacher of short sides": DetectionTransform(SQUARE, Augmentation(crop=CROP), SHORT),
}
EPOCHS = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    images = [
        {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        for number, (width, height) in enumerate(SHAPES)
    ]
    boxes = [(image, 10.0 * place) for image, count in enumerate(OBJECTS) for place in range(count)]
    annotations = [
        annotation(number, [start, 20, 60, 60], image, area=3600, iscrowd=0)
        for number, (image, start) in enumerate(boxes)
    ]
    return write_split(tmp_path_factory.mktemp("shapes"), coco(images=images, annotations=annotations))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_nothing_larger_is_drawn(files, name):
    """And without crops, whose widest and tallest are rare, it is reached."""
    transform = TRANSFORMS[name]
    data = load_coco_split(*files).with_transform(transform)
    largest, collate = LargestImages(data), DetectionCollator()
    assert largest.objects == max(OBJECTS)
    example = data[TrainingSample(1, 0, 0, 0)]
    one, several = (collate(largest.batch(example, images)) for images in (1, 3))
    drawn = [
        collate([data[TrainingSample(image, 0, epoch, 0)]]) for epoch in range(EPOCHS) for image in range(len(SHAPES))
    ]
    assert one.keys() == several.keys() == drawn[0].keys()
    for key in (key for key in one if key.endswith("pixel_values")):
        sides = torch.tensor([batch[key].shape[2:] for batch in drawn]).float()
        area, (height, width) = one[key][0, 0].numel(), several[key].shape[2:]
        assert sides.prod(1).max() <= 1.03 * area
        assert sides[:, 0].max() <= 1.03 * height and sides[:, 1].max() <= 1.03 * width
        if transform.augmentation is None or transform.augmentation.crop is None:
            assert (sides.prod(1).max(), *sides.amax(0)) == (area, height, width)
        assert len(several[key]) == 3
    assert [label["objects"] for label in several["labels"]] == [max(OBJECTS)] * 3
    assert several["targets"].shape[1] == max(OBJECTS)


def test_the_largest_crops_are_drawn_some_day(files):
    """Of every shape alone, for the panorama's whole is wider than any crop."""
    data = load_coco_split(*files).with_transform(TRANSFORMS["crop"])
    for index, shape in enumerate(SHAPES):
        largest, sizes = LargestImages(data.select([index])), [resized_size(shape, 48, 100)]
        for _ in range(4000):
            left, top, right, bottom = random_region(shape, CROP)
            sizes.append(resized_size((right - left, bottom - top), 48, 100))
        width, height = max(width for width, _ in sizes), max(height for _, height in sizes)
        assert largest.sides(2) == pytest.approx((height, width), rel=0.04)
        area = max(width * height for width, height in sizes)
        assert torch.tensor(largest.sides(1)).prod() == pytest.approx(area, rel=0.04)


def test_a_teacher_sees_the_largest_crops_too(files):
    data = load_coco_split(*files).with_transform(TRANSFORMS["a teacher of short sides"])
    example = {"pixel_values": torch.zeros(3, 8, 8), "teacher_pixel_values": torch.zeros(3, 8, 8), "labels": {}}
    for index, shape in enumerate(SHAPES[:2]):
        sizes = [resized_size(shape, 32, 80)]
        for _ in range(4000):
            left, top, right, bottom = random_region(shape, CROP)
            sizes.append(resized_size((right - left, bottom - top), 32, 80))
        (large, _) = LargestImages(data.select([index])).batch(example, 2)
        expected = max(height for _, height in sizes), max(width for width, _ in sizes)
        assert tuple(large["teacher_pixel_values"].shape[1:]) == pytest.approx(expected, rel=0.04)


def test_rows_that_were_not_chosen_do_not_count(files):
    data = load_coco_split(*files).with_transform(TRANSFORMS["plain"])
    assert LargestImages(data.select([2])).objects == 0 and LargestImages(data.select([2])).sides(2) == (32, 32)
    assert LargestImages(data.select([3])).sides(1) == (27, 80)


def test_images_without_labels_count(files):
    """The largest may be one of them, and an epoch has theirs; they have no objects."""
    data = load_coco_split(*files).with_transform(TRANSFORMS["plain"])
    both = LargestImages(data.select([2]).with_unlabeled(data.select([3]), 2))
    assert (both.sides(1), both.images, both.objects) == ((27, 80), 3, 0)
