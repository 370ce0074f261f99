"""Detections and their COCO average precision, right for one process and for many."""

from d3etr_hf.evaluation.coco_average_precision import CocoAveragePrecision, coco_average_precision
from d3etr_hf.evaluation.detections import select_detections, to_coco_detections

__all__ = ["CocoAveragePrecision", "coco_average_precision", "select_detections", "to_coco_detections"]
