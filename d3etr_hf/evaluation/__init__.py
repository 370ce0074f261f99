"""Detections and their COCO average precision, right for one process and for many."""

from d3etr_hf.evaluation.coco_average_precision import CocoAveragePrecision, coco_average_precision
from d3etr_hf.evaluation.detections import detect, select_detections, to_coco_detections
from d3etr_hf.evaluation.prediction import average_precision_of, predict_detections

__all__ = [
    "CocoAveragePrecision",
    "average_precision_of",
    "coco_average_precision",
    "detect",
    "predict_detections",
    "select_detections",
    "to_coco_detections",
]
