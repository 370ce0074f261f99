"""Splits in other formats than COCO, read through it: the cache of COCO files does for them, too.

The readers of YOLO and Pascal VOC are this project's own. That of `supervision`, the library that reads both, takes
an image's size without its EXIF turn, numbers the classes of Pascal VOC anew in each split, refuses images that are
neither RGB nor grey, names no line of a file that it cannot read, and wants OpenCV.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import datasets

from d3etr_hf.data.coco import load_coco_split
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.errors import DatasetError, one_line

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}


def load_converted(
    coco: dict, folder: Path, name: str, source: str, roots: Iterable[str | Path] | None
) -> DetectionDataset:
    """A split from the COCO detection dictionary that a reader made, which is kept as a file in the cache.

    Args:
        coco: its dictionary; `file_name` relative to the folder.
        folder: of the data set.
        name, source, roots: as in `load_coco_split`.

    Raises:
        DatasetError: as `load_coco_split`.
    """
    content = json.dumps(coco).encode()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "d3etr_hf" / "converted"
    path = cache / f"{hashlib.sha256(content).hexdigest()}.json"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            # written aside and moved, so that another process sees the whole file or none
            with tempfile.TemporaryDirectory(dir=cache) as beside:
                unfinished = Path(beside) / path.name
                unfinished.write_bytes(content)
                os.replace(unfinished, path)
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be written ({one_line(error)}): make room there, or set HF_DATASETS_CACHE."
        ) from error
    return load_coco_split(path, folder, name=name, roots=roots, source=source)


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and those in it, in order of their paths; hidden ones are passed over."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [
            Path(place, name) for name in names if name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def relative(path: str | Path, folder: Path) -> str:
    """A path as `file_name` has it: relative to a folder that it lies in, so that a copy elsewhere is the same."""
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    inside = os.path.join(folder, "")
    return path[len(inside) :] if path.startswith(inside) else path
