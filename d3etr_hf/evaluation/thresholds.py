"""The confidence threshold that a detector is best used with: of each class and of all, that of the highest F1."""

import numpy as np
import torch

from d3etr_hf.data import DetectionDataset
from d3etr_hf.evaluation.coco_average_precision import matches_at
from d3etr_hf.evaluation.detections import to_coco_detections

IOU = 0.5
MOST_DIGITS = 12  # of a threshold; two scores of float32 have fewer in common


def best_thresholds(detections: torch.Tensor, dataset: DetectionDataset) -> dict:
    """Thresholds of the highest F1 at IoU 0.5, on the data set's untouched ground truth.

    A detection is one if its score is above the threshold, as in Transformers. Of a class F1 counts its own objects
    and detections, of all classes those of all; crowd regions count for neither.

    Args:
        detections: (images, 100, 6), rows of `select_detections`, in the data set's order.
        dataset: without a detection of it that is not finite.

    Returns:
        `classes` (name → the same) and `all`: `threshold`, `F1`, `precision` and `recall`, 0..1. A class of which no
        object is found at any threshold is left out; so is `all` where that is every class.
    """
    found = matches_at(
        dataset.ground_truth,
        to_coco_detections(detections, dataset.rows["image_id"], dataset.category_ids),
        IOU,
    )
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    of_classes = {names[category]: best_threshold(*matches) for category, matches in found.items()}
    scores, matched, objects = zip(*found.values(), strict=True)
    of_all = best_threshold(np.concatenate(scores), np.concatenate(matched), sum(objects))
    chosen = {"classes": {name: best for name, best in of_classes.items() if best is not None}}
    return chosen if of_all is None else chosen | {"all": of_all}


def best_threshold(scores: np.ndarray, matched: np.ndarray, objects: int) -> dict[str, float] | None:
    """The threshold of the highest F1, in as few digits as tell it from the others; of equal ones the highest.

    Detections are matched with objects in the order of their scores, so that what is left above a threshold is matched
    as if there were no others.

    Args:
        scores: (n,) of detections, float32 as float64.
        matched: (n,) bool, whether each has an object of its own.
        objects: how many there are.

    Returns:
        `threshold`, `F1`, `precision`, `recall`; None where no object is found.
    """
    if not matched.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(matched[order])
    kept = np.arange(1, len(scores) + 1)
    apart = np.append(scores[1:] != scores[:-1], True)  # no threshold separates equal scores
    f1 = np.where(apart, 2 * right / (kept + objects), -1)
    last = int(f1.argmax())
    below = scores[last + 1] if last + 1 < len(scores) else 0.0
    return {
        "threshold": shortest_between(float(below), float(scores[last])),
        "F1": float(f1[last]),
        "precision": float(right[last] / kept[last]),
        "recall": float(right[last] / objects),
    }


def shortest_between(low: float, high: float) -> float:
    """A number in `low <= number < high` of as few decimals as possible, also when it is rounded to float32."""
    for digits in range(1, MOST_DIGITS + 1):
        number = round((low + high) / 2, digits)
        if low <= float(np.float32(number)) < high:
            return number
    return low
