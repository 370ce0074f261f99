"""Splits in the Hub's usual object-detection schema, from the Hub or from a local folder.

The folder holds Parquet files, or images with `metadata.jsonl`, `.csv` or `.parquet`; for the schema see
`d3etr_hf.data.hub_rows`.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from d3etr_hf.data.hub_rows import Categories, as_coco, categories_of, described, with_objects
from d3etr_hf.data.image_files import caches, check_image_files
from d3etr_hf.errors import DatasetError, one_line
from d3etr_hf.files import regular_file

logger = logging.getLogger(__name__)


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
    categories are the values met in any split, named `category 3`; where it is text, they are the texts met in any
    split in alphabetical order.

    Args:
        path_or_name: Hub id, or a local folder of Parquet files, or of images with their metadata.
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
    given = [path_or_name, *([] if cache_dir is None else [cache_dir]), *caches()]
    splits = _load_splits(path_or_name, workers, cache_dir)
    if split not in splits:
        raise DatasetError(f"{path_or_name}: no split `{split}`: choose one of {', '.join(splits)}.")
    roots = None if allow_images_elsewhere else given
    return split_of(splits, split, name or f"{name_of_folder(path_or_name)}/{split}", roots, str(path_or_name))


def hub_splits(
    path_or_name: str | Path,
    workers: int = 1,
    allow_images_elsewhere: bool = False,
    class_names: Sequence[str] | None = None,
) -> dict[str, Callable[[], DetectionDataset]]:
    """All splits of a data set by name, each checked when it is called for.

    Args, Raises: as `load_hub_split`; class_names: see `categories_of`.
    """
    splits = _load_splits(path_or_name, workers, None)
    roots = None if allow_images_elsewhere else [path_or_name, *caches()]
    place, name = str(path_or_name), name_of_folder(path_or_name)
    return {split: partial(split_of, splits, split, f"{name}/{split}", roots, place, class_names) for split in splits}


def split_of(
    splits: Mapping[str, datasets.Dataset],
    split: str,
    name: str,
    roots: list[str | Path] | None,
    place: str,
    class_names: Sequence[str] | None = None,
) -> DetectionDataset:
    """One of the splits of a data set that was loaded, checked.

    Args:
        splits: all of them, whose categories are the same.
        split: which.
        name: of the split, for messages.
        roots: folders that image files may lie in; None for anywhere.
        place: what messages call the data set.
        class_names: see `categories_of`.
    """
    tables = {each: with_objects(rows, f"{place}/{each}") for each, rows in splits.items()}
    categories = categories_of(list(tables.values()), class_names, place)
    # Undecoded, because the decoder of `datasets` turns images by EXIF whatever size the annotations mean.
    # Of the loaded rows, which stay files that are mapped into memory, also where `objects` is text.
    images = splits[split].select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    _check_images(images, roots, name)
    rows = described(tables[split], images, name)
    coco = as_coco(rows, categories, name)
    checked = check_coco(coco, source=name)
    if checked.report:
        warnings.warn(checked.report, stacklevel=2)
    columns = datasets.Dataset.from_dict(checked.columns(), features=datasets.Features(BOX_FEATURES))
    return DetectionDataset(
        name=name,
        class_names=checked.class_names,
        category_ids=checked.category_ids,
        rows=datasets.concatenate_datasets([images, columns], axis=1),
        load_ground_truth=partial(_ground_truth, rows, categories, name),
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
            "with Parquet files such as train-*.parquet and validation-*.parquet, or images with their metadata.jsonl."
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


def _ground_truth(rows: datasets.Dataset, categories: Categories, place: str) -> dict:
    return without_nulls(as_coco(rows, categories, place))
