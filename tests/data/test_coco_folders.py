"""Exports without splits; the layouts with splits are in test_reading.py and test_coco.py."""

import json
from pathlib import Path

import pytest

from d3etr_hf.data import DataArguments
from d3etr_hf.data.coco_folders import find_coco_splits
from d3etr_hf.data.reading import read_splits
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import coco
from tests.data.formats import write_coco, write_image, write_text


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("_annotations.coco.json", "."),
        ("result.json", "."),
        ("annotations/instances_default.json", "images/default"),
    ],
)
def test_exports_without_splits(annotations: str, images: str, tmp_path: Path) -> None:
    write_text(tmp_path / annotations, json.dumps(coco()))
    write_image(tmp_path / images / "7.png")
    assert find_coco_splits(tmp_path) == {"train": (tmp_path / annotations, tmp_path / images)}


def test_all_splits_are_found(tmp_path: Path) -> None:
    assert find_coco_splits(tmp_path) == {}
    for split in ("train", "valid", "test"):
        write_text(tmp_path / split / "_annotations.coco.json", "{}")
    assert list(find_coco_splits(tmp_path)) == ["train", "valid", "test"]


def test_annotations_without_images_matter_where_they_are_chosen(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_text(tmp_path / "annotations" / "test.json", json.dumps(coco()))
    assert len(read_splits(DataArguments(data_folder=str(tmp_path)))[1]) == 2
    with pytest.raises(DatasetError, match="annotations/test.json is there, but none of the image folders test"):
        read_splits(DataArguments(data_folder=str(tmp_path), dataset_val_split="test"))


def test_another_tools_result_is_no_data_set(tmp_path: Path) -> None:
    write_text(tmp_path / "result.json", '{"AP": 0.5}')
    assert find_coco_splits(tmp_path) == {}
