"""Boxes in other units are told before training, and those that are right never are."""

from pathlib import Path

import numpy as np
import pytest

from d3etr_hf.data.checking import check_coco
from d3etr_hf.data.coco import load_coco_split
from d3etr_hf.data.hub_datasets import load_hub_split
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import annotation, coco, write_split
from tests.data.test_hub_datasets import row, write_parquet

WIDTH, HEIGHT = 40, 30


def drawn_boxes(count: int, largest: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random boxes (n, 4), x, y, width, height in pixels, of up to such a share of the sides, inside their image."""
    generator, sides = np.random.default_rng(seed), np.array([WIDTH, HEIGHT])
    size = generator.uniform(0.1, largest, (count, 2)) * sides
    return np.concatenate([generator.uniform(0, 1, (count, 2)) * (sides - size), size], axis=1).round(2)


def as_corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def as_centres(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)


def as_fractions(boxes: np.ndarray) -> np.ndarray:
    return boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]


def given(boxes: np.ndarray) -> dict:
    return coco(annotations=[annotation(index, box) for index, box in enumerate(boxes.tolist(), 1)])


@pytest.mark.parametrize("largest", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_fractions, r"val\.json: all 30 boxes .* look like fractions .*annotation 1; .* multiply x and width"),
        (lambda boxes: as_fractions(as_corners(boxes)), "look like fractions"),
        (lambda boxes: as_fractions(as_centres(boxes)), "look like fractions"),
        (as_corners, r"val\.json: all 30 boxes look like corners .* write x1, y1, x2 - x1, y2 - y1"),
    ],
)
def test_other_units_are_refused(change, message: str, largest: float) -> None:
    """Guards against an AP of 0 without a word."""
    with pytest.raises(DatasetError, match=message):
        check_coco(given(change(drawn_boxes(30, largest))), "val.json")


@pytest.mark.parametrize("largest", [0.2, 0.4, 0.7, 1.0])
def test_boxes_in_pixels_are_never_suspected(largest: float) -> None:
    """Guards against a false alarm: objects of all sizes, those that fill the image, and few of them."""
    for seed in range(40):
        for count in (1, 5, 30):
            boxes = drawn_boxes(count, largest, seed)
            assert check_coco(given(boxes), "val.json").report == ""


@pytest.mark.parametrize("beyond", [1, 8])
def test_boxes_that_leave_their_image_are_clipped_and_not_suspected(beyond: float) -> None:
    """Guards against taking objects at the border, annotated beyond it on all sides, for corners."""
    boxes = drawn_boxes(200, 0.5) - [beyond, beyond, -2 * beyond, -2 * beyond]
    assert "look like" not in check_coco(given(boxes), "val.json").report


def test_boxes_of_a_few_pixels_are_boxes() -> None:
    """Guards against refusing place holders of one pixel, and images of one pixel."""
    boxes = np.array([[0, 0, 1, 1]] * 6, dtype=float)
    assert check_coco(given(boxes), "val.json").report == ""
    images = [{"id": 3, "file_name": "3.png", "width": 1, "height": 1}]
    regions = [annotation(1, [0, 0, 0.5, 0.5])]
    assert check_coco(coco(images=images, annotations=regions), "val.json").report == ""


def test_what_is_not_certain_is_one_warning(tmp_path: Path) -> None:
    """Guards against silence where a part came from another source, a split is small, or boxes are centres."""
    right = drawn_boxes(27)
    mixed = np.concatenate([right, as_fractions(drawn_boxes(3))])
    annotations, images = write_split(tmp_path, given(mixed))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=r"train\.json: 3 of 30 boxes .* fractions .*annotation 28"):
            load_coco_split(annotations, images, cache_dir=tmp_path / "cache")
    few = as_corners(np.array([[20, 15, 10, 10], [25, 5, 10, 10], [5, 20, 8, 8]], dtype=float))
    assert "all 3 boxes look like corners" in check_coco(given(few), "val.json").report
    centres = check_coco(given(as_centres(drawn_boxes(60, 0.5))), "val.json").report
    assert "all 60 boxes look like centres" in centres and "subtract half the width" in centres


def test_boxes_of_a_hub_data_set(tmp_path: Path) -> None:
    """Guards the other way in."""
    boxes = as_fractions(drawn_boxes(9)).tolist()
    rows = [row(index, [{"bbox": box, "category": 0} for box in boxes[index::3]]) for index in range(3)]
    folder = write_parquet(tmp_path / "data", rows, fields=("bbox", "category"))
    with pytest.raises(DatasetError, match="train: all 9 boxes .* look like fractions"):
        load_hub_split(folder, "train", cache_dir=tmp_path / "cache")


def test_a_box_in_the_first_pixel_hides_no_corners() -> None:
    """Guards against training on corners because of one small box."""
    boxes = np.concatenate([[[0.25, 0.25, 0.5, 0.5]], as_corners(drawn_boxes(30))])
    with pytest.raises(DatasetError, match="all 30 boxes look like corners"):
        check_coco(given(boxes), "val.json")
