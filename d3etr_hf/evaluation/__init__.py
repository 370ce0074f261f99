"""Detections and their COCO average precision, right for one process and for many."""

from typing import TYPE_CHECKING, Any

from d3etr_hf import optional_torchvision  # noqa: F401
from d3etr_hf.evaluation.coco_average_precision import coco_average_precision
from d3etr_hf.evaluation.detections import detect, select_detections, to_coco_detections
from d3etr_hf.evaluation.prediction import average_precision_of, predict_detections
from d3etr_hf.evaluation.thresholds import best_thresholds

if TYPE_CHECKING:
    from d3etr_hf.evaluation.coco_metric import CocoAveragePrecision

__all__ = [
    "CocoAveragePrecision",
    "average_precision_of",
    "best_thresholds",
    "coco_average_precision",
    "detect",
    "predict_detections",
    "select_detections",
    "to_coco_detections",
]


def __getattr__(name: str) -> Any:
    """`CocoAveragePrecision` only when it is asked for: it imports `evaluate`, which nothing else needs."""
    if name == "CocoAveragePrecision":
        from d3etr_hf.evaluation.coco_metric import CocoAveragePrecision

        return CocoAveragePrecision
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
