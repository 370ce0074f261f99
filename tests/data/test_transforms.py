from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import ConditionalDetrImageProcessorPil, RTDetrImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data.coco import load_coco_split
from d3etr_hf.data.coco_folders import find_coco_split
from d3etr_hf.data.transforms import (
    Augmentation,
    CropSizes,
    DetectionTransform,
    random_region,
    resized_size,
)
from d3etr_hf.errors import DatasetError

CROP = CropSizes((50, 60, 75), 48, 75)
AUGMENTATIONS = {
    "flip": Augmentation([100], 160),
    "multiscale": Augmentation([60, 80, 100], 130),
    "crop": Augmentation([60, 80, 100], 130, CROP),
}
SQUARE_AUGMENTATIONS = {"flip": Augmentation(), "crop": Augmentation(crop=CROP)}


def plain_processor(short_side: int = 100, long_side: int = 160) -> ConditionalDetrImageProcessorPil:
    """Resizes and pads as always, but leaves colours in 0..1, so that they can be recognised."""
    size = {"shortest_edge": short_side, "longest_edge": long_side}
    return ConditionalDetrImageProcessorPil(size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3)


def target_of(boxes: list, labels: list, image_id: int = 8) -> dict:
    return {
        "image_id": image_id,
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "class_labels": torch.tensor(labels, dtype=torch.int64),
    }


def painted_box(channel: torch.Tensor) -> list[int] | None:
    """xyxy in pixels of where a channel is at least half as bright as at its brightest; None where that is dark.

    Half of its own: a rectangle that shrank to less than a pixel is grey, and would look smaller against white.
    """
    if channel.max() <= 0.5:
        return None
    rows, columns = torch.nonzero(channel > 0.5 * channel.max(), as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@st.composite
def two_rectangles(draw: st.DrawFn) -> tuple[tuple[int, int], list[list[int]]]:
    """Image size, and a box in its left and one in its right half, at least 3 pixels wide and high."""
    width, height = draw(st.integers(30, 220)), draw(st.integers(30, 220))
    boxes = []
    for first, last in ((0, width // 2), (width // 2, width)):
        left = draw(st.integers(first, last - 3))
        top = draw(st.integers(0, height - 3))
        boxes.append([left, top, draw(st.integers(left + 3, last)), draw(st.integers(top + 3, height))])
    return (width, height), boxes


@settings(max_examples=150, deadline=None)
@given(two_rectangles(), st.sampled_from([None, *AUGMENTATIONS]), st.integers(0, 2**31))
def test_boxes_and_labels_stay_on_their_pixels(
    scene: tuple[tuple[int, int], list[list[int]]], name: str | None, seed: int
) -> None:
    """Guards flip, resize and crop: the boxes must lie where the painted rectangles are found again."""
    transform = DetectionTransform(plain_processor(), AUGMENTATIONS[name] if name else None)
    assert_boxes_on_their_pixels(transform, *scene, seed)


@settings(max_examples=100, deadline=None)
@given(two_rectangles(), st.sampled_from([None, *SQUARE_AUGMENTATIONS]), st.integers(0, 2**31))
def test_boxes_stay_on_their_pixels_in_squares(
    scene: tuple[tuple[int, int], list[list[int]]], name: str | None, seed: int
) -> None:
    """Guards boxes of images that lose their proportions: the two axes are scaled by factors of their own."""
    processor = RTDetrImageProcessorPil(size={"height": 96, "width": 96})
    transform = DetectionTransform(processor, SQUARE_AUGMENTATIONS[name] if name else None)
    example = assert_boxes_on_their_pixels(transform, *scene, seed)
    assert example["pixel_values"].shape == (3, 96, 96)


def assert_boxes_on_their_pixels(
    transform: DetectionTransform, size: tuple[int, int], boxes: list[list[int]], seed: int
) -> dict:
    """The example of a black image with a red box and a green one, which must be found where its boxes say."""
    image = Image.new("RGB", size)
    for box, colour in zip(boxes, [(255, 0, 0), (0, 255, 0)], strict=True):
        ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=colour)
    torch.manual_seed(seed)
    example = transform(image, target_of(boxes, [0, 1]))

    labels, pixels = example["labels"], example["pixel_values"]
    assert labels["size"].tolist() == list(pixels.shape[1:])
    assert labels["orig_size"].tolist() == [size[1], size[0]]
    height, width = pixels.shape[1:]
    cx, cy, w, h = (labels["boxes"] * torch.tensor([width, height, width, height])).unbind(1)
    corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1)
    assert (corners > -1e-3).all() and (corners[:, 2] < width + 1e-3).all() and (corners[:, 3] < height + 1e-3).all()
    found_labels = labels["class_labels"].tolist()
    assert len(found_labels) == len(corners) == len(set(found_labels))
    for label in (0, 1):
        painted = painted_box(pixels[label])
        if label not in found_labels:
            assert painted is None or min(painted[2] - painted[0], painted[3] - painted[1]) <= 1
            continue
        box = corners[found_labels.index(label)]
        if painted is None:
            # A sliver at the border of a crop, or one that shrank away, may not be half bright anywhere.
            assert (box[2:] - box[:2]).min() < 1.5
        else:
            np.testing.assert_allclose(painted, box, atol=1.01)
    return example


def test_evaluation_labels_against_the_image_processor(shared_data: Path) -> None:
    """Guards boxes, sizes and pixels at evaluation against the processor's own annotation handling, image by image."""
    processor = ConditionalDetrImageProcessorPil(size={"shortest_edge": 120, "longest_edge": 200})
    dataset = load_coco_split(*find_coco_split(shared_data / "coco_mini", "val"))
    transform = DetectionTransform(processor)
    by_image: dict[int, list[dict]] = {}
    for region in dataset.ground_truth["annotations"]:
        by_image.setdefault(region["image_id"], []).append(region)
    for index in range(40):
        example = dataset[index]
        ours = transform(example["image"], example["target"])
        image_id = example["target"]["image_id"]
        annotations = {"image_id": image_id, "annotations": by_image.get(image_id, [])}
        theirs = processor(example["image"], annotations=annotations, do_pad=False, return_tensors="pt")
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"][0], rtol=0, atol=0)
        reference = theirs["labels"][0]
        torch.testing.assert_close(ours["labels"]["boxes"], reference["boxes"], rtol=1e-5, atol=1e-6)
        for key in ("image_id", "orig_size", "size"):
            assert ours["labels"][key].equal(reference[key]), key
            assert ours["labels"][key].dtype == torch.int64
        raw_ids = [dataset.category_ids[label] for label in ours["labels"]["class_labels"].tolist()]
        assert raw_ids == reference["class_labels"].tolist()


def test_an_unflipped_image_is_the_same_as_at_evaluation() -> None:
    """Guards against another resize, interpolation or normalisation in training than at evaluation."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    image, target = Image.fromarray(pixels), target_of([[5, 6, 50, 60]], [2])
    processor = ConditionalDetrImageProcessorPil(size={"shortest_edge": 100, "longest_edge": 160})
    expected = DetectionTransform(processor)(image, target)
    mirrored = expected["pixel_values"].flip(-1)
    seen = Counter()
    for seed in range(20):
        torch.manual_seed(seed)
        example = DetectionTransform(processor, AUGMENTATIONS["flip"])(image, target)
        if example["pixel_values"].equal(expected["pixel_values"]):
            seen["as it was"] += 1
            torch.testing.assert_close(example["labels"], expected["labels"])
        else:
            seen["flipped"] += 1
            # Pillow's fixed-point resize is symmetric up to one of 255 grey values.
            torch.testing.assert_close(example["pixel_values"], mirrored, rtol=0, atol=1.01 / 255 / 0.224)
    assert min(seen["as it was"], seen["flipped"]) >= 4


@settings(max_examples=150, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.integers(0, 2**31))
def test_crops_are_detrs(width: int, height: int, seed: int) -> None:
    """Guards the crop: its size in the resized image, and its place inside."""
    torch.manual_seed(seed)
    left, top, right, bottom = random_region((width, height), CROP)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    possible = []
    for side in CROP.resized_short_sides:
        resized = np.array(resized_size((width, height), side))
        assert min(resized) == side
        scale = resized / (width, height)
        cropped = np.array([right - left, bottom - top]) * scale
        # each edge is rounded to a whole pixel of the original
        possible.append((cropped >= 48 - scale).all() and (cropped <= np.minimum(75, resized) + scale).all())
    assert any(possible)


def test_every_choice_is_drawn() -> None:
    """Guards against short sides, crop sizes or places that never come up (an upper end left out, for example)."""
    image, target = Image.new("RGB", (200, 100)), target_of([], [])

    def sizes(name: str, count: int) -> list[tuple[int, int]]:
        transform = DetectionTransform(plain_processor(), AUGMENTATIONS[name])
        shapes = [transform(image, target)["pixel_values"].shape for _ in range(count)]
        return [(width, height) for _, height, width in shapes]

    torch.manual_seed(0)
    resized = Counter(sizes("multiscale", 300))
    # A short side of 80 or 100 would make the long one 160 or 200: it gives way to 130, and the short side with it.
    assert set(resized) == {(120, 60), (130, 65)} and resized[120, 60] > 60 and resized[130, 65] > 140

    regions = [random_region((200, 100), CropSizes((50,), 48, 50)) for _ in range(400)]
    # a pixel of the resized image is two of the original
    found = {(right - left, bottom - top) for left, top, right, bottom in regions}
    assert found == {(w, h) for w in (96, 98, 100) for h in (96, 98, 100)}
    assert min(region[0] for region in regions) == 0
    assert max(region[2] for region in regions) == 200
    assert max(region[3] for region in regions) == 100

    # The image is twice as wide as high; no crop of 48 to 75 pixels is.
    cropped = sum(width < 1.8 * height for width, height in sizes("crop", 200))
    assert 60 < cropped < 140


def test_an_image_narrower_than_the_smallest_crop() -> None:
    """Guards against an empty range where rounding leaves a resized side below the smallest crop."""
    torch.manual_seed(0)
    left, top, right, bottom = random_region((20, 30), CropSizes((10,), 12, 14))
    assert (left, right) == (0, 20) and 24 <= bottom - top <= 28


def test_detr_sizes_scale_with_the_short_side() -> None:
    """Guards crops on small images: none may be larger than the image they are cut from."""
    assert CropSizes().scaled(1) == CropSizes((400, 500, 600), 384, 600)
    assert CropSizes().scaled(0.12) == CropSizes((48, 60, 72), 46, 72)


def test_a_crop_that_loses_every_box_is_an_image_without_boxes() -> None:
    """Guards the types and shapes of an example whose objects were cut away."""
    transform = DetectionTransform(plain_processor(), Augmentation([60], 130, CropSizes((100,), 10, 20)))
    image, target = Image.new("RGB", (100, 100)), target_of([[0, 0, 4, 4]], [1])
    torch.manual_seed(0)
    examples = [transform(image, target) for _ in range(60)]
    empty = [example["labels"] for example in examples if not len(example["labels"]["boxes"])]
    assert len(empty) > 10
    assert empty[0]["boxes"].shape == (0, 4) and empty[0]["boxes"].dtype == torch.float32
    assert empty[0]["class_labels"].shape == (0,) and empty[0]["class_labels"].dtype == torch.int64


def test_the_seed_decides_everything() -> None:
    """Guards resuming: torch's generator is seeded for each image, and no other one may be drawn from."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    transform = DetectionTransform(plain_processor(), AUGMENTATIONS["crop"])

    def examples() -> list[dict]:
        torch.manual_seed(5)
        return [transform(Image.fromarray(pixels), target_of([[5, 6, 50, 60]], [2])) for _ in range(8)]

    torch.testing.assert_close(examples(), examples(), rtol=0, atol=0)


@pytest.mark.parametrize("augmentation", [None, AUGMENTATIONS["flip"]])
def test_an_image_too_narrow_to_resize_is_named(augmentation: Augmentation | None) -> None:
    """Guards against "height and width must be > 0" without a hint at which image."""
    transform = DetectionTransform(plain_processor(), augmentation)
    with pytest.raises(DatasetError, match="image 8 of 5000×2 pixels cannot be resized"):
        transform(Image.new("RGB", (5000, 2)), target_of([], []))


NOISE = np.random.default_rng(3).integers(0, 256, (70, 130, 3), dtype=np.uint8)
TO_SQUARES = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
BY_SHORT_SIDE = ConditionalDetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 60})


def test_squares_at_evaluation_are_the_image_processors() -> None:
    """Guards pixels, boxes and sizes of images that are not square, against Transformers' own annotation handling."""
    box = [13, 7, 65, 42]
    ours = DetectionTransform(TO_SQUARES)(Image.fromarray(NOISE), target_of([box], [2]))
    region = {"bbox": [13, 7, 52, 35], "category_id": 2, "area": 52 * 35, "iscrowd": 0}
    annotations = {"image_id": 8, "annotations": [region]}
    theirs = TO_SQUARES(Image.fromarray(NOISE), annotations=annotations, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"][0], rtol=0, atol=0)
    torch.testing.assert_close(ours["labels"]["boxes"], theirs["labels"][0]["boxes"], rtol=1e-5, atol=1e-6)
    # by hand: 13..65 of 130 across, 7..42 of 70 down
    torch.testing.assert_close(ours["labels"]["boxes"], torch.tensor([[0.3, 0.35, 0.4, 0.5]]))
    assert ours["labels"]["orig_size"].tolist() == [70, 130] and ours["labels"]["size"].tolist() == [64, 64]


@pytest.mark.parametrize(
    ("student", "teacher", "augmentation"),
    [
        (BY_SHORT_SIDE, TO_SQUARES, AUGMENTATIONS["crop"]),
        (TO_SQUARES, BY_SHORT_SIDE, SQUARE_AUGMENTATIONS["crop"]),
        (BY_SHORT_SIDE, plain_processor(), AUGMENTATIONS["multiscale"]),
        (TO_SQUARES, RTDetrImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=True), None),
    ],
)
def test_a_teachers_pixels_are_of_the_same_augmented_image(
    student: BaseImageProcessor, teacher: BaseImageProcessor, augmentation: Augmentation | None
) -> None:
    """Guards against a teacher that sees another crop or flip, or the student's pixels instead of its own."""
    image, target = Image.fromarray(NOISE), target_of([[5, 6, 50, 60]], [2])
    for seed in range(8):
        torch.manual_seed(seed)
        example = DetectionTransform(student, augmentation, teacher)(image, target)
        torch.manual_seed(seed)
        alone = DetectionTransform(student, augmentation)(image, target)
        assert alone.keys() == {"pixel_values", "labels"}  # and the student's are what they are without a teacher
        torch.testing.assert_close(example["pixel_values"], alone["pixel_values"], rtol=0, atol=0)
        torch.manual_seed(seed)
        seen = image if augmentation is None else augmentation(image, target["boxes"], target["class_labels"])[0]
        expected = teacher(seen, do_pad=False, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(example["teacher_pixel_values"], expected, rtol=0, atol=0)
