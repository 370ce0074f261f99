"""Detectors that emit, per decoder layer and query group, predictions and attention maps in one common type."""

from d3etr_hf.models.conditional_detr import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.dab_detr import D3etrDabDetrForObjectDetection
from d3etr_hf.models.deformable_detr import D3etrDeformableDetrForObjectDetection
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.detr import D3etrDetrForObjectDetection
from d3etr_hf.models.table_transformer import D3etrTableTransformerForObjectDetection

__all__ = [
    "D3etrConditionalDetrForObjectDetection",
    "D3etrDabDetrForObjectDetection",
    "D3etrDeformableDetrForObjectDetection",
    "D3etrDetrForObjectDetection",
    "D3etrTableTransformerForObjectDetection",
    "Detector",
]
