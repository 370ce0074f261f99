"""Splits in the Hub's usual object-detection schema, from the Hub or from a local folder of Parquet files.

Columns: `image`, `image_id`, `width`, `height`, and `objects` with `bbox` (xywh in pixels), `category` (a ClassLabel
or an integer) and, if there, `area`, `iscrowd`; `objects` is a list of records or a record of lists.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError

from d3etr_hf.data.checking import check_coco
from d3etr_hf.data.coco_fields import without_nulls
from d3etr_hf.data.dataset import BOX_FEATURES, DetectionDataset
from d3etr_hf.data.image_files import caches, check_image_files
from d3etr_hf.errors import DatasetError, one_line
from d3etr_hf.files import regular_file

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image_id", "width", "height", "objects")
REQUIRED_OBJECT_FIELDS = ("bbox", "category")
# Field of an object on the Hub: what a COCO annotation calls it.
OBJECT_FIELDS = {"bbox": "bbox", "category": "category_id", "area": "area", "iscrowd": "iscrowd"}


def load_hub_split(
    path_or_name: str | Path,
    split: str,
    name: str | None = None,
    workers: int = 1,
    cache_dir: str | Path | None = None,
    allow_images_elsewhere: bool = False,
) -> DetectionDataset:
    """Loads and checks one split through `datasets.load_dataset`.

    Boxes that had to be dropped or clipped are told in one warning. Where `category` is a plain integer, the
    categories are the values met in any split, named `category 3`.

    Args:
        path_or_name: Hub id, or a local folder of Parquet files.
        split: as the data set calls it, for example `validation`.
        name: by default `path_or_name/split`, of a folder its last part alone: names are published.
        workers: processes that prepare the data set.
        cache_dir: of `datasets`; None for its own default.
        allow_images_elsewhere: whether images of which a row holds the path alone may lie outside of the folder and
            the caches of Hugging Face.

    Raises:
        DatasetError: the data set or the split is not there, a column or a field is missing, images are missing or
            elsewhere, or see `check_coco`.
    """
    place, name = f"{path_or_name}/{split}", name or f"{name_of_folder(path_or_name)}/{split}"
    splits = _load_splits(path_or_name, workers, cache_dir)
    _check_splits(splits, split, path_or_name)
    names = _category_names(splits)
    described = splits[split].select_columns(list(IMAGE_COLUMNS))
    coco = _as_coco(described, names, place)
    checked = check_coco(coco, source=place)
    if checked.report:
        warnings.warn(checked.report, stacklevel=2)
    # Undecoded, because the decoder of `datasets` turns images by EXIF whatever size the annotations mean.
    images = splits[split].select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    given = [path_or_name, *([] if cache_dir is None else [cache_dir]), *caches()]
    _check_images(images, None if allow_images_elsewhere else given, place)
    columns = datasets.Dataset.from_dict(checked.columns(), features=datasets.Features(BOX_FEATURES))
    return DetectionDataset(
        name=name,
        class_names=checked.class_names,
        category_ids=checked.category_ids,
        rows=datasets.concatenate_datasets([images, columns], axis=1),
        load_ground_truth=partial(_ground_truth, described, names, place),
        annotations_digest=_digest_of(coco),
    )


def name_of_folder(path: str | Path) -> str:
    """The last part of a local folder's path, "." and a trailing slash seen through; a Hub id as it is."""
    return Path(os.path.abspath(path)).name if os.path.isdir(path) else str(path)


def _load_splits(path_or_name: str | Path, workers: int, cache_dir: str | Path | None) -> datasets.DatasetDict:
    _require_files(Path(path_or_name))
    load = partial(
        _load_valid,
        str(path_or_name),
        num_proc=workers if workers > 1 else None,
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    try:
        try:
            return load()
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file system or the network; Arrow's own has no number
            logger.warning("%s: its cached copy is damaged (%s) and is made anew", path_or_name, one_line(error))
            return load(download_mode=datasets.DownloadMode.REUSE_CACHE_IF_EXISTS)
    # Not found, no network, no supported files, files that do not fit together.
    except (OSError, ValueError, DatasetsError) as error:
        raise DatasetError(
            f"{path_or_name}: the data set cannot be loaded ({one_line(error)}): give a Hub id, or a folder "
            "with Parquet files such as train-*.parquet and validation-*.parquet."
        ) from error


def _load_valid(path_or_name: str, **options: Any) -> datasets.DatasetDict:
    splits = datasets.load_dataset(path_or_name, **options)
    for rows in splits.values():
        rows.data.table.validate(full=True)
    return splits


def _require_files(folder: Path) -> None:
    """`datasets` passes over named pipes and the like without a word."""
    for path in _visible_files(folder):
        try:
            regular_file(path)
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read ({error.strerror}): take it out of the folder.") from error


def _visible_files(folder: Path) -> Iterator[str]:
    """What is in a folder and those in it, but for what is hidden, such as a clone's .git."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (os.path.join(place, name) for name in names if name[0] != ".")


def _check_images(rows: datasets.Dataset, roots: list[str | Path] | None, name: str) -> None:
    """That each row has an image's content, or the path of a file that may be read."""
    images = rows.data.column("image")
    content, paths = (pc.struct_field(images, field) for field in ("bytes", "path"))
    alone = pc.and_(pc.is_valid(images), pc.is_null(content))
    without_image = pc.sum(pc.and_(pc.is_null(content), pc.is_null(paths))).as_py()
    if without_image:
        raise DatasetError(f"{name}: {without_image} rows have no image: add the images, or take the rows out.")
    check_image_files([os.path.abspath(path) for path in paths.filter(alone).to_pylist()], roots, name)


def _digest_of(coco: dict) -> str:
    digest = hashlib.sha256()
    for part in ("images", "annotations", "categories"):
        for entry in coco[part]:
            digest.update(json.dumps(entry, default=str).encode())
    return digest.hexdigest()


def _check_splits(splits: datasets.DatasetDict, split: str, path_or_name: str | Path) -> None:
    if split not in splits:
        raise DatasetError(f"{path_or_name}: no split `{split}`: choose one of {', '.join(splits)}.")
    for name, rows in splits.items():
        _check_columns(rows, f"{path_or_name}/{name}")


def _check_columns(rows: datasets.Dataset, place: str) -> None:
    missing = [column for column in ("image", *IMAGE_COLUMNS) if column not in rows.features]
    if missing:
        raise DatasetError(
            f"{place}: the columns {missing} are missing (there are {list(rows.features)}): object detection data "
            "sets have image, image_id, width, height and objects; rename or add them."
        )
    missing = [field for field in REQUIRED_OBJECT_FIELDS if field not in _object_features(rows)]
    if missing:
        raise DatasetError(
            f"{place}: the fields {missing} of `objects` are missing (there are {list(_object_features(rows))}): "
            "rename or add them."
        )


def _object_features(rows: datasets.Dataset) -> dict:
    """Feature of each field of one object, whichever way round `objects` is stored."""
    objects = rows.features["objects"]
    if isinstance(objects, datasets.List):
        return objects.feature if isinstance(objects.feature, dict) else {}
    if not isinstance(objects, dict):
        return {}
    return {field: values.feature for field, values in objects.items() if isinstance(values, datasets.List)}


def _category_names(splits: datasets.DatasetDict) -> dict[int, str]:
    category = _object_features(next(iter(splits.values())))["category"]
    if isinstance(category, datasets.ClassLabel):
        return dict(enumerate(category.names))
    values: set[int] = set()
    for rows in splits.values():
        for row in rows.select_columns(["objects"]):
            values.update(value for value in _field(row["objects"], "category") if value is not None)
    return {value: f"category {value}" for value in sorted(values)}


def _field(objects: dict | list[dict] | None, field: str) -> list:
    """One field of all objects of an image; an image without objects may have null in their place."""
    if objects is None:
        return []
    if isinstance(objects, dict):
        return objects[field] or []
    return [record[field] for record in objects]


def _ground_truth(rows: datasets.Dataset, names: dict[int, str], place: str) -> dict:
    return without_nulls(_as_coco(rows, names, place))


def _as_coco(rows: datasets.Dataset, names: dict[int, str], place: str) -> dict:
    """The COCO detection dictionary of these rows; annotations are numbered from 1, as `id` need not be distinct."""
    fields = [name for name in OBJECT_FIELDS if name in _object_features(rows)]
    images, annotations = [], []
    for row in rows:
        images.append({"id": row["image_id"], "width": row["width"], "height": row["height"]})
        columns = [_field(row["objects"], field) for field in fields]
        if len({len(column) for column in columns}) > 1:
            lengths = {field: len(column) for field, column in zip(fields, columns, strict=True)}
            raise DatasetError(
                f"{place}: the fields of `objects` of image {row['image_id']} differ in length: {lengths}."
            )
        for values in zip(*columns, strict=True):
            annotation = {OBJECT_FIELDS[field]: value for field, value in zip(fields, values, strict=True)}
            annotations.append({"id": len(annotations) + 1, "image_id": row["image_id"], **annotation})
    categories = [{"id": category_id, "name": category_name} for category_id, category_name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
