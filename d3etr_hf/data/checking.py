"""Checks a COCO detection dictionary once, so that nothing after it meets a box or a label it cannot use."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from d3etr_hf.data.box_units import check_box_units
from d3etr_hf.data.coco_fields import check_fields
from d3etr_hf.errors import DatasetError, quoted

logger = logging.getLogger(__name__)

# COCO's own files round x, y, width and height to 0.01 pixel, so a right edge may leave the image by twice that.
ROUNDING = 0.05


@dataclass
class CheckedSplit:
    """What training needs of a COCO detection dictionary.

    Attributes:
        class_names: name of each class label, in order of raw category id.
        category_ids: raw category id of each class label.
        images: the dictionary's images, in its order.
        boxes: per image `(n, 4)` float32, xyxy in pixels, inside the image, each with an area, no crowds.
        class_labels: per image `(n,)` int64, 0..C-1.
        report: which boxes were clipped or dropped, and whether they look like other units; empty if none was, and
            they do not.
    """

    class_names: list[str]
    category_ids: list[int]
    images: list[dict]
    boxes: list[np.ndarray]
    class_labels: list[np.ndarray]
    report: str

    def columns(self) -> dict[str, list]:
        """One entry an image, as the rows of a `DetectionDataset`."""
        return {
            "image_id": [image["id"] for image in self.images],
            "width": [image["width"] for image in self.images],
            "height": [image["height"] for image in self.images],
            "boxes": [boxes.tolist() for boxes in self.boxes],
            "class_labels": [labels.tolist() for labels in self.class_labels],
        }


def check_coco(coco: dict, source: str, file_names: bool = False) -> CheckedSplit:
    """Checks a COCO detection dictionary and brings its boxes into the form that training uses.

    Crowd regions are left out. Boxes of negative size, without area or wholly outside their image
    are dropped, boxes partly outside are clipped; both are counted in the report. Images without a box are kept.

    Args:
        coco: as in a COCO detection JSON; boxes xywh in pixels.
        source: what an error message calls the dictionary, for example its path.
        file_names: whether its images must have a `file_name`.

    Raises:
        DatasetError: a part or a field is missing or of the wrong type, an id or a category name appears twice, an
            annotation belongs to an unknown image or category, boxes are fractions or corners, or no usable one is
            left.
    """
    check_fields(coco, source, file_names)
    names = _checked_categories(coco["categories"], source)
    _require_distinct((image["id"] for image in coco["images"]), f"{source}: image id")
    _check_annotations(coco["annotations"], {image["id"] for image in coco["images"]}, names, source)

    category_ids = sorted(names)
    annotations = [annotation for annotation in coco["annotations"] if not annotation.get("iscrowd")]
    crowds = len(coco["annotations"]) - len(annotations)
    if crowds:
        logger.info("%s: %d crowd regions are left out of the training labels.", source, crowds)
    objects = _objects(annotations, coco["images"], category_ids)
    units = check_box_units(objects.boxes, objects.sides, objects.ids, source)
    boxes, class_labels, dropped = _usable_boxes(objects, len(coco["images"]), crowds, source)
    report = " ".join(filter(None, (units, dropped)))
    return CheckedSplit([names[i] for i in category_ids], category_ids, coco["images"], boxes, class_labels, report)


def _checked_categories(categories: list[dict], source: str) -> dict[int, str]:
    if not categories:
        raise DatasetError(f"{source}: `categories` is empty: list each category's id and name.")
    _require_distinct((category["id"] for category in categories), f"{source}: category id")
    _require_distinct((category["name"] for category in categories), f"{source}: category name")
    return {category["id"]: category["name"] for category in categories}


def _check_annotations(annotations: list[dict], image_ids: set[int], names: dict[int, str], source: str) -> None:
    for annotation in annotations:
        place = f"{source}: annotation {annotation['id']} of image {annotation['image_id']}"
        if annotation["image_id"] not in image_ids:
            raise DatasetError(f"{place}: `images` does not list that image: add it, or take the annotation out.")
        if annotation["category_id"] not in names:
            raise DatasetError(
                f"{place} has category {annotation['category_id']}, which `categories` does not list: add the "
                "category, or take the annotation out."
            )
    _require_distinct((annotation["id"] for annotation in annotations), f"{source}: annotation id")


@dataclass
class _Objects:
    """The annotations that are no crowds: ids (n,), index of each one's image (n,), class labels (n,), boxes (n, 4) as
    given, and width and height of their images (n, 2), pixels."""

    ids: np.ndarray
    image_index: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    sides: np.ndarray


def _objects(annotations: list[dict], images: list[dict], category_ids: list[int]) -> _Objects:
    position = {image["id"]: index for index, image in enumerate(images)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    image_index = np.array([position[annotation["image_id"]] for annotation in annotations], dtype=np.int64)
    sides = np.array([[image["width"], image["height"]] for image in images], dtype=np.float64).reshape(-1, 2)
    return _Objects(
        ids=np.array([annotation["id"] for annotation in annotations], dtype=np.int64),
        image_index=image_index,
        labels=np.array([label_of[annotation["category_id"]] for annotation in annotations], dtype=np.int64),
        boxes=np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4),
        sides=sides[image_index],
    )


def _usable_boxes(
    objects: _Objects, images: int, crowds: int, source: str
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Per image the boxes and class labels of `CheckedSplit`, and its report."""
    ids, given, limits = objects.ids, objects.boxes, np.tile(objects.sides, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
        clipped = np.clip(corners, 0, limits)
        # Compared as stored: a width that float32 rounds away is no width.
        boxes = clipped.astype(np.float32)
        outside = (corners[:, 2:] <= 0).any(1) | (corners[:, :2] >= limits[:, :2]).any(1)
        faults = {
            "not finite": ~np.isfinite(corners).all(1),
            "of negative size": (given[:, 2:] < 0).any(1),
            "without area": (given[:, 2:] == 0).any(1),
            "outside their image": outside,
            "too thin to have an area": (boxes[:, 2:] <= boxes[:, :2]).any(1),
        }
        moved = (np.abs(corners - clipped) > ROUNDING).any(1)

    usable = np.ones(len(ids), dtype=bool)
    counts = []
    for kind, faulty in faults.items():
        counts += _count(f"{kind} dropped", ids[faulty & usable])
        usable &= ~faulty
    counts += _count("partly outside their image clipped", ids[moved & usable])
    if not usable.any():
        raise DatasetError(
            f"{source}: no usable box is left of {len(ids) + crowds} annotations ({crowds} crowd regions"
            f"{''.join(f'; {count}' for count in counts)}): check that this is the right file."
        )

    order = np.argsort(objects.image_index[usable], kind="stable")
    ends = np.cumsum(np.bincount(objects.image_index[usable], minlength=images))[:-1]
    aside = "this is about training labels: evaluation reads the annotations as they are"
    report = f"{source}: boxes {'; '.join(counts)}; {aside}." if counts else ""
    return np.split(boxes[usable][order], ends), np.split(objects.labels[usable][order], ends), report


def _count(what: str, ids: np.ndarray) -> list[str]:
    return [f"{what}: {len(ids)} (first annotation ids {ids[:5].tolist()})"] if len(ids) else []


def _require_distinct(values: Iterable, what: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise DatasetError(
            f"{what} {quoted(repeated[0])} appears more than once ({len(repeated)} such values, the first "
            f"{quoted(repeated[:5])}): make each one unique."
        )
