"""From rows of the Hub's object-detection schema to a COCO detection dictionary, what they lack derived.

Columns: `image`, `objects` and, if there, `image_id`, `width`, `height`. `objects` is a list of records, a record of
lists, or the same as JSON text (as in a CSV file), with `bbox` (xywh in pixels), a category and, if there, `area` and
`iscrowd`. A category is a ClassLabel, an integer, or a name.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

from d3etr_hf.data.upright_size import SIZE_OF_BROKEN, upright_size
from d3etr_hf.errors import DatasetError, one_line, quoted

logger = logging.getLogger(__name__)

CATEGORY_FIELDS = ("category", "categories", "category_id", "label", "labels")
BROKEN = "broken"  # a column of `described`: whether an image whose size is needed cannot be read
# Field of an object on the Hub: what a COCO annotation calls it.
OBJECT_FIELDS = {"bbox": "bbox", "area": "area", "iscrowd": "iscrowd"}


@dataclass(frozen=True)
class Categories:
    """The categories of a data set.

    Attributes:
        field: of an object that holds its category.
        ids: the raw category id of each value that is text; other values are ids themselves.
        names: of each raw category id.
    """

    field: str
    ids: dict[str, int]
    names: dict[int, str]


def with_objects(rows: datasets.Dataset, place: str) -> datasets.Dataset:
    """The rows, with `objects` read where they are JSON text.

    Raises:
        DatasetError: a column or a field is missing, or a text is no JSON of objects.
    """
    missing = [column for column in ("image", "objects") if column not in rows.features]
    if missing:
        raise DatasetError(
            f"{place}: the columns {missing} are missing (there are {list(rows.features)}): object detection data "
            "sets have image and objects, and mostly image_id, width and height; rename or add them."
        )
    if getattr(rows.features["objects"], "dtype", None) in ("string", "large_string"):
        rows = _parsed(rows, place)
    fields = object_features(rows)
    missing = [] if "bbox" in fields else ["bbox"]
    missing += [] if any(name in fields for name in CATEGORY_FIELDS) else ["category"]
    if missing:
        raise DatasetError(
            f"{place}: the fields {missing} of `objects` are missing (there are {list(fields)}): rename or add them."
        )
    return rows


def _parsed(rows: datasets.Dataset, place: str) -> datasets.Dataset:
    parsed = []
    for index, text in enumerate(rows["objects"]):
        try:
            parsed.append(None if text is None else json.loads(text))
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"{place}: `objects` of row {index} is {quoted(text)}, which is no JSON ({one_line(error)}): write it "
                'as {"bbox": [[x, y, width, height], ...], "category": [...]}.'
            ) from None
    try:
        column = datasets.Dataset.from_dict({"objects": parsed})
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{place}: the texts of `objects` are of different types ({one_line(error)}): write all rows alike."
        ) from None
    # not `concatenate_datasets`, whose table loses its length where columns of one part are left out later
    features = datasets.Features({**rows.features, **column.features})
    table = rows.with_format("arrow")[:].drop(["objects"]).append_column("objects", column.data.column("objects"))
    return datasets.Dataset(
        datasets.table.InMemoryTable(table.select(list(features))), datasets.DatasetInfo(features=features)
    )


def object_features(rows: datasets.Dataset) -> dict:
    """Feature of each field of one object, whichever way round `objects` is stored."""
    objects = rows.features["objects"]
    if isinstance(objects, datasets.List):
        return objects.feature if isinstance(objects.feature, dict) else {}
    if not isinstance(objects, dict):
        return {}
    return {field: values.feature for field, values in objects.items() if isinstance(values, datasets.List)}


def categories_of(splits: Sequence[datasets.Dataset], class_names: Sequence[str] | None, place: str) -> Categories:
    """The categories, the same for all splits: those of the features, or else the values that are met in any split.

    Names are numbered in alphabetical order, or in that of `class_names`; numbers are called `category 3`, or as
    `class_names` says.

    Args:
        splits: of the data set, from `with_objects`.
        class_names: of the categories; None: as the data say.
        place: what an error message calls the data set.

    Raises:
        DatasetError: `class_names` cannot be those of the data.
    """
    fields = object_features(splits[0])
    field = next(name for name in CATEGORY_FIELDS if name in fields)
    feature = fields[field]
    if isinstance(feature, datasets.ClassLabel):
        return Categories(field, {}, dict(enumerate(feature.names)))
    values: set = set()
    for rows in splits:
        for row in rows.select_columns(["objects"]):
            values.update(value for value in values_of(row["objects"], field) if value is not None)
    if values and all(isinstance(value, str) for value in values):
        return _named(field, values, class_names, place)
    numbers = sorted(value for value in values if isinstance(value, int))
    if class_names is None:
        return Categories(field, {}, {value: f"category {value}" for value in numbers})
    if numbers and numbers[0] > 0 and len(class_names) > len(numbers):
        raise DatasetError(
            f"{place}: class_names are {len(class_names)} names, but the objects are of the {len(numbers)} categories "
            f"{quoted(numbers[:10])}, and none is 0, so that the first name's number is unknown: give a name to each "
            "of these in this order."
        )
    if numbers and numbers[0] == 0 and numbers[-1] < len(class_names):
        return Categories(field, {}, dict(enumerate(class_names)))
    if len(numbers) == len(class_names):
        return Categories(field, {}, dict(zip(numbers, class_names, strict=True)))
    raise DatasetError(
        f"{place}: class_names are {len(class_names)} names, but the objects are of {len(numbers)} categories, "
        f"{quoted(numbers[:10])}: give a name to each number from 0 on, or to each of these in this order."
    )


def _named(field: str, values: set[str], class_names: Sequence[str] | None, place: str) -> Categories:
    names = sorted(values) if class_names is None else list(class_names)
    unknown = sorted(values - set(names))
    if unknown:
        raise DatasetError(
            f"{place}: class_names lack {quoted(unknown[:5])}, which objects are named: give all names, or leave "
            "class_names out (rename_classes gives other names)."
        )
    return Categories(field, {name: index for index, name in enumerate(names)}, dict(enumerate(names)))


def values_of(objects: dict | list[dict] | None, field: str) -> list:
    """One field of all objects of an image; an image without objects may have null in their place."""
    if objects is None:
        return []
    if isinstance(objects, dict):
        return objects[field] or []
    return [record[field] for record in objects]


def described(rows: datasets.Dataset, images: datasets.Dataset, place: str) -> datasets.Dataset:
    """`image_id`, `width`, `height` and `objects` of the rows; `broken` as well where sizes are derived.

    Rows without an `image_id`, or with text there, are numbered from 0; without width and height they are the image's,
    as it is seen upright. Images that cannot be read are marked as broken.

    Args:
        rows: of a split, from `with_objects`.
        images: its column `image`, undecoded; their paths have been looked at.
        place: what a log message calls the split.
    """
    columns = {}
    kind = getattr(rows.features.get("image_id"), "dtype", None)
    if kind in (None, "string", "large_string"):
        columns["image_id"] = list(range(len(rows)))
    if not {"width", "height"} <= rows.features.keys():
        found = [_size(image) for image in images["image"]]
        sizes = [size or SIZE_OF_BROKEN for size in found]
        columns["width"], columns["height"] = [width for width, _ in sizes], [height for _, height in sizes]
        columns[BROKEN] = [size is None for size in found]
    if columns:
        logger.info("%s: %s of each image derived", place, ", ".join(columns))
    kept = [name for name in ("image_id", "width", "height", "objects") if name in rows.features.keys() - columns]
    derived = datasets.Dataset.from_dict(
        columns,
        features=datasets.Features({name: datasets.Value("bool" if name == BROKEN else "int64") for name in columns}),
    )
    rows = rows.select_columns(kept)
    return datasets.concatenate_datasets([rows, derived], axis=1) if columns else rows


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return upright_size(image["path"] if image["bytes"] is None else image["bytes"])


def as_coco(rows: datasets.Dataset, categories: Categories, place: str) -> dict:
    """The COCO detection dictionary of these rows; annotations are numbered from 1, as `id` need not be distinct.

    Args:
        rows: from `described`.
        categories: of the data set.
        place: what an error message calls the split.

    Raises:
        DatasetError: the fields of an image's objects differ in length.
    """
    given = object_features(rows)
    names = {name: coco_name for name, coco_name in OBJECT_FIELDS.items() if name in given}
    names[categories.field] = "category_id"
    images, annotations = [], []
    for row in rows:
        images.append({"id": row["image_id"], "width": row["width"], "height": row["height"]})
        if row.get(BROKEN):
            continue
        columns = [values_of(row["objects"], field) for field in names]
        if len({len(column) for column in columns}) > 1:
            lengths = {field: len(column) for field, column in zip(names, columns, strict=True)}
            raise DatasetError(
                f"{place}: the fields of `objects` of image {row['image_id']} differ in length: {lengths}."
            )
        for values in zip(*columns, strict=True):
            annotation = dict(zip(names.values(), values, strict=True))
            category = annotation["category_id"]
            if isinstance(category, str):
                annotation["category_id"] = categories.ids.get(category, category)
            annotations.append({"id": len(annotations) + 1, "image_id": row["image_id"], **annotation})
    listed = [{"id": category_id, "name": category_name} for category_id, category_name in categories.names.items()]
    return {"images": images, "annotations": annotations, "categories": listed}
