"""COCO average precision of boxes, computed by faster-coco-eval where it is installed, else by pycocotools."""

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:  # the extra [fast]: the same statistics, of compiled code
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster
except ImportError:
    FastCOCO, COCOeval_faster = COCO, COCOeval

# The places of these in COCOeval.stats of both libraries; 9..11 are the average recalls by size.
STATISTICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")


def coco_average_precision(
    ground_truth: dict, predictions: list[dict], image_ids: Iterable[int] | None = None
) -> dict[str, float]:
    """COCO's average precision and recall of boxes. Neither argument is modified.

    An image without predictions counts all its objects as missed. Crowd regions are ignored. An annotation without
    `area` gets its box's area, one without `iscrowd` is no crowd; null is as left out.

    Args:
        ground_truth: COCO detection dictionary (`images`, `annotations`, `categories`), boxes xywh in pixels.
        predictions: COCO results, `{"image_id", "category_id", "bbox": xywh in pixels, "score"}`; may be empty.
        image_ids: the images to evaluate; None for all. Predictions for other images of the ground truth are left out.

    Returns:
        AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, and "AP/<class name>" for each class, as
        Python floats in 0..1. What does not exist is left out: a class or a size range without objects, and everything
        where no evaluated image has an object (a warning says so).

    Raises:
        ValueError: predictions or `image_ids` that the ground truth does not know, predictions that are not finite, an
            image, category or class name that occurs twice, or no image to evaluate.
    """
    names = _category_names(ground_truth)
    known_images = _image_ids(ground_truth)
    _check_predictions(predictions, known_images, names)
    evaluated = _evaluated_images(image_ids, known_images)

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        evaluation = COCOeval_faster(
            _indexed(ground_truth, _ground_truth_regions(ground_truth, names, known_images), FastCOCO),
            _indexed(ground_truth, _predicted_regions(predictions), FastCOCO),
            "bbox",
        )
        evaluation.params.imgIds = evaluated
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    values = dict(zip(STATISTICS, evaluation.stats, strict=False))
    # precision: (IoU thresholds, recall thresholds, classes, size ranges, detection limits); [0, -1]: all sizes, 100.
    for index, category_id in enumerate(evaluation.params.catIds):
        values[f"AP/{names[category_id]}"] = evaluation.eval["precision"][:, :, index, 0, -1].mean()
    if values["AP"] < 0:
        warnings.warn(
            f"The {len(evaluated)} evaluated images have no object that is not a crowd region (first image id: "
            f"{evaluated[0]}): average precision does not exist and is left out.",
            stacklevel=2,
        )
    # pycocotools marks what does not exist by -1.
    return {name: float(value) for name, value in values.items() if value >= 0}


def _category_names(ground_truth: dict) -> dict[int, str]:
    """The class name of each category id; each id and each name must be there once."""
    if not ground_truth["categories"]:
        raise ValueError("The ground truth's `categories` are empty: pass a COCO file that lists its classes.")
    for field in ("id", "name"):
        value, count = Counter(category[field] for category in ground_truth["categories"]).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"category {field} {value!r} occurs {count} times in the ground truth's `categories`: results are "
                "reported by name, so make ids and names unique."
            )
    return {category["id"]: category["name"] for category in ground_truth["categories"]}


def _image_ids(ground_truth: dict) -> set[int]:
    """The ids of the images; each must be there once."""
    counts = Counter(image["id"] for image in ground_truth["images"])
    if len(counts) < len(ground_truth["images"]):
        raise ValueError(f"image id {counts.most_common(1)[0][0]} occurs twice in the ground truth's `images`.")
    return set(counts)


def _evaluated_images(image_ids: Iterable[int] | None, known_images: set[int]) -> list[int]:
    """Those of the known images that are to be evaluated, at least one, in order."""
    evaluated = known_images if image_ids is None else {int(image_id) for image_id in image_ids}
    unknown = sorted(evaluated - known_images)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the `image_ids` are not in the ground truth's `images` (first: {unknown[0]}): "
            "pass the annotation file of these images."
        )
    if not evaluated:
        raise ValueError("There is no image to evaluate: the ground truth's `images`, or `image_ids`, are empty.")
    return sorted(evaluated)


def _check_predictions(predictions: list[dict], known_images: set[int], names: dict[int, str]) -> None:
    for index, prediction in enumerate(predictions):
        image_id, category_id = prediction["image_id"], prediction["category_id"]
        if image_id not in known_images:
            raise ValueError(
                f"prediction {index}: image id {image_id} is not in the ground truth's `images`: pass the annotation "
                "file of the images that the model has seen."
            )
        if category_id not in names:
            raise ValueError(
                f"prediction {index} (image id {image_id}): category id {category_id} is not in the ground truth's "
                f"`categories` ({min(names)}..{max(names)}): map the model's labels to the file's category ids."
            )
        if len(prediction["bbox"]) != 4 or not np.isfinite([*prediction["bbox"], prediction["score"]]).all():
            raise ValueError(
                f"prediction {index} (image id {image_id}): bbox {prediction['bbox']}, score {prediction['score']}: "
                "pass four finite numbers, x, y, width, height in pixels, and a finite score."
            )


def _ground_truth_regions(ground_truth: dict, names: dict[int, str], known_images: set[int]) -> list[dict]:
    """Copies of the annotations with what pycocotools needs."""
    regions: list[dict] = []
    skipped = []
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] not in known_images or annotation["category_id"] not in names:
            skipped.append(annotation.get("id"))
            continue
        width, height = annotation["bbox"][2:]
        area = annotation.get("area")
        regions.append(
            {
                # pycocotools writes 0 for "not matched", so an annotation with id 0 would never count as found.
                "id": len(regions) + 1,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": annotation["bbox"],
                "area": width * height if area is None else area,
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    if skipped:
        warnings.warn(
            f"{len(skipped)} annotations of the ground truth belong to an image or category that it does not list and "
            f"are not evaluated (first annotation ids: {skipped[:5]}).",
            stacklevel=3,
        )
    return regions


def _predicted_regions(predictions: list[dict]) -> list[dict]:
    """Copies of the predictions with what `COCO.loadRes` adds; it modifies its argument and fails on an empty list."""
    return [
        {
            "id": index + 1,
            "image_id": prediction["image_id"],
            "category_id": prediction["category_id"],
            "bbox": prediction["bbox"],
            "score": prediction["score"],
            "area": prediction["bbox"][2] * prediction["bbox"][3],
            "iscrowd": 0,
        }
        for index, prediction in enumerate(predictions)
    ]


def _indexed(ground_truth: dict, regions: list[dict], kind: type = COCO) -> Any:
    indexed = kind()
    indexed.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": regions,
    }
    indexed.createIndex()
    return indexed


def matches_at(
    ground_truth: dict, predictions: list[dict], iou: float
) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
    """Which predictions COCO's matching gives an object, highest score first, of up to 100 an image and class.

    Args:
        ground_truth, predictions: as in `coco_average_precision`.
        iou: at least that of a prediction's box and its object's.

    Returns:
        Category id → scores (n,) float64 and whether each has an object (n,) bool, without those that fall into a
        crowd region; and the number of objects that are no crowd.

    Raises:
        ValueError: see `coco_average_precision`.
    """
    names, known_images = _category_names(ground_truth), _image_ids(ground_truth)
    _check_predictions(predictions, known_images, names)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _indexed(ground_truth, _ground_truth_regions(ground_truth, names, known_images)),
            _indexed(ground_truth, _predicted_regions(predictions)),
            "bbox",
        )
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
    found = {}
    for category in evaluation.params.catIds:
        images = [image for image in evaluation.evalImgs if image is not None and image["category_id"] == category]
        counted = [~image["dtIgnore"][0].astype(bool) for image in images]
        scores = [np.asarray(image["dtScores"])[kept] for image, kept in zip(images, counted, strict=True)]
        matched = [image["dtMatches"][0][kept] > 0 for image, kept in zip(images, counted, strict=True)]
        objects = sum(int((np.asarray(image["gtIgnore"]) == 0).sum()) for image in images)
        found[category] = (
            np.concatenate([np.empty(0), *scores]),
            np.concatenate([np.empty(0, dtype=bool), *matched]),
            objects,
        )
    return found
