"""What is told of images that are in both splits."""

from pathlib import Path

from d3etr_hf.data import load_coco_split
from d3etr_hf.data.duplicates import describe_shared
from tests.data.coco_files import coco, write_split


def test_shared_images_are_counted_in_validation(tmp_path: Path) -> None:
    """One image of validation that training has twice."""
    train, val = (load_coco_split(*write_split(tmp_path, coco(), split), name=split) for split in ("train", "val"))
    told = describe_shared(train, val, [[(0, 0), (0, 1), (1, 1)]])
    assert told.startswith(f"1 of 2 images of val are in train as well, the first {val.place_of(val.rows[1])}, which")
    assert describe_shared(train, val, [[(0, 0), (0, 1)]]) == ""
