"""Detectors that emit, per decoder layer and query group, predictions and attention maps in one common type."""

from d3etr_hf.models.conditional_detr import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.detr import D3etrDetrForObjectDetection
from d3etr_hf.models.lw_detr import D3etrLwDetrForObjectDetection
from d3etr_hf.models.rf_detr import D3etrRfDetrForObjectDetection

__all__ = [
    "D3etrConditionalDetrForObjectDetection",
    "D3etrDetrForObjectDetection",
    "D3etrLwDetrForObjectDetection",
    "D3etrRfDetrForObjectDetection",
    "Detector",
]
