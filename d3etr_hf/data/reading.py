"""The data set that the arguments name, in whatever format it is."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr_hf.data.class_names import with_names
from d3etr_hf.data.coco import load_coco_split
from d3etr_hf.data.coco_folders import find_coco_splits, splits_without_images
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.hub_datasets import hub_splits, name_of_folder
from d3etr_hf.data.pascal_voc import find_voc, voc_source
from d3etr_hf.data.splits import Source, choose_splits
from d3etr_hf.data.yolo import find_yolo, yolo_source
from d3etr_hf.errors import DatasetError, quoted
from d3etr_hf.files import nearest_place

if TYPE_CHECKING:
    from d3etr_hf.data.data_arguments import DataArguments

logger = logging.getLogger(__name__)

FORMATS = {
    "COCO": "annotations/train.json (or instances_train2017.json) with train/, or train/_annotations.coco.json",
    "YOLO": "data.yaml with `names`, or classes.txt with labels/",
    "Pascal VOC": "Annotations/ of XML files with JPEGImages/ or images/, or XML files beside the images in train/",
    "images with metadata": "metadata.jsonl, .csv or .parquet, in the folder or in train/",
    "Parquet": "*.parquet",
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_splits(arguments: "DataArguments") -> tuple[DetectionDataset, DetectionDataset]:
    """The training and the validation split, without transforms.

    Raises:
        DatasetError: no data are named, a split cannot be read, or the two have different categories.
    """
    check_places(arguments)
    source = open_source(arguments)

    def named(read: Callable[[], DetectionDataset]) -> DetectionDataset:
        return with_names(read(), arguments.class_names, arguments.rename_classes)

    train, val = choose_splits(
        replace(source, splits={split: partial(named, read) for split, read in source.splits.items()}),
        arguments.dataset_train_split,
        arguments.dataset_val_split,
        arguments.validation_fraction,
        arguments.validation_seed,
    )
    _require_same_categories(train, val)
    return train, val


def check_places(arguments: "DataArguments") -> None:
    """See that what the arguments name is there and is a data set, before anything is read.

    A Hub data set is not asked for.

    Raises:
        DatasetError: it is not; the message names the option and what is there instead.
    """
    if arguments.data_folder is not None:
        require_place(arguments.data_folder, "data_folder", lambda place: os.path.isdir(place) or _is_yaml(place))
        _format_of(Path(arguments.data_folder))
    elif arguments.dataset_name is not None:
        name = arguments.dataset_name
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            require_place(name, "dataset_name", os.path.isdir)
    elif arguments.train_annotations is None:
        raise DatasetError(
            "no data: give data_folder (COCO, YOLO, Pascal VOC, or images with their metadata), dataset_name (Hub), "
            "or train_annotations, train_images, val_annotations and val_images."
        )
    for split in ("train", "val"):
        annotations, images = (getattr(arguments, f"{split}_{part}") for part in ("annotations", "images"))
        if annotations is not None:
            require_place(annotations, f"{split}_annotations", os.path.isfile)
            require_place(images, f"{split}_images", os.path.isdir)


def open_source(arguments: "DataArguments") -> Source:
    """The data set that the arguments name; its splits are read when they are called for.

    Raises:
        DatasetError: it is of no format that is known, or cannot be opened.
    """
    anywhere = arguments.allow_images_elsewhere
    if arguments.data_folder is not None:
        return _open_folder(Path(arguments.data_folder), arguments)
    if arguments.dataset_name is not None:
        return _open_hub(arguments.dataset_name, arguments)
    given = {
        split: (Path(getattr(arguments, f"{split}_annotations")), Path(getattr(arguments, f"{split}_images")))
        for split in ("train", "val")
        if getattr(arguments, f"{split}_annotations") is not None
    }
    roots = None if anywhere else [images for _, images in given.values()]
    names = _told_apart([annotations for annotations, _ in given.values()])
    splits = {
        split: partial(load_coco_split, *places, name=name, roots=roots)
        for (split, places), name in zip(given.items(), names, strict=True)
    }
    return Source("the data", splits)


def _open_hub(path_or_name: str, arguments: "DataArguments") -> Source:
    splits = hub_splits(
        path_or_name, arguments.dataset_workers, arguments.allow_images_elsewhere, arguments.class_names
    )
    return Source(path_or_name, splits)


def _open_folder(folder: Path, arguments: "DataArguments") -> Source:
    anywhere, kind = arguments.allow_images_elsewhere, _format_of(folder)
    if kind != "COCO":
        logger.info("%s: read as %s", folder, kind)
    if kind == "YOLO":
        return yolo_source(find_yolo(folder), anywhere)
    if kind == "Pascal VOC":
        return voc_source(find_voc(folder, anywhere))
    if kind != "COCO":
        return _open_hub(str(folder), arguments)
    name, roots = name_of_folder(folder), None if anywhere else [folder]
    splits = {
        split: partial(load_coco_split, *places, name=f"{name}/{split}", roots=roots)
        for split, places in find_coco_splits(folder).items()
    }
    return Source(str(folder), splits, splits_without_images(folder))


def _format_of(folder: Path) -> str:
    """Which of `FORMATS` a folder, or a `data.yaml`, is of.

    Raises:
        DatasetError: of none; the message lists what was looked for, and what is there.
    """
    if folder.is_dir() and find_coco_splits(folder):
        return "COCO"
    if find_yolo(folder) is not None:
        return "YOLO"
    if folder.is_dir():
        if find_voc(folder) is not None:
            return "Pascal VOC"
        if any(any(folder.glob(f"{place}{name}")) for place in ("", "*/") for name in METADATA):
            return "images with metadata"
        if any(folder.rglob("*.parquet")):
            return "Parquet"
    looked = "; ".join(f"{name} ({files})" for name, files in FORMATS.items())
    raise DatasetError(
        f"{folder}: no data set that is known is in it. Looked for: {looked}. Found: {_content_of(folder)}. Name "
        "another folder, or the files by `train_annotations` and its like."
    )


def _content_of(folder: Path, most: int = 8) -> str:
    if not folder.is_dir():
        return "a file without `names`"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if path.name[0] != ".")
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(quoted, names[:most])) + more if names else "nothing"


def _is_yaml(path: Path) -> bool:
    """Whether it is a file as YOLO's data.yaml."""
    return path.suffix in (".yaml", ".yml") and os.path.isfile(path)


def require_place(path: str, option: str, is_right: Callable[[Path], bool] = os.path.isdir) -> None:
    """See that a file or a folder is there, or say what is nearest to it.

    Raises:
        DatasetError: it is not; the message names the option.
    """
    wanted = "file" if option.endswith("_annotations") else "folder"
    if "\0" in path:
        raise DatasetError(f"{option} {quoted(path)}: no {wanted} has such a name.")
    place = Path(path)
    if is_right(place):
        return
    if os.path.exists(place):
        raise DatasetError(f"{option} {quoted(path)} is no {wanted}: name the {wanted}.")
    raise DatasetError(f"{option} {quoted(path)}: there is no such {wanted}{nearest_place(place) or '.'}")


def _told_apart(paths: list[Path]) -> list[str]:
    """A short name for each file: its last part, or as many of them as differ; no whole path of a machine."""
    depth = 1
    parts = [path.absolute().with_suffix("").parts for path in paths]
    while len({each[-depth:] for each in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def _require_same_categories(train: DetectionDataset, val: DetectionDataset) -> None:
    train_names = dict(zip(train.category_ids, train.class_names, strict=True))
    val_names = dict(zip(val.category_ids, val.class_names, strict=True))
    for category_id in sorted(train_names.keys() | val_names.keys()):
        in_train, in_val = train_names.get(category_id), val_names.get(category_id)
        if in_train != in_val:
            raise DatasetError(
                f"category {category_id} is {_quoted(in_train)} in {train.name} but {_quoted(in_val)} in {val.name}: "
                "list the same ids and names in both splits."
            )


def _quoted(name: str | None) -> str:
    return "missing" if name is None else repr(name)
