"""Detectors that emit, per decoder layer and query group, predictions and attention maps in one common type."""

from d3etr_hf import optional_torchvision  # noqa: F401
from d3etr_hf.models.conditional_detr import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.d_fine import D3etrDFineForObjectDetection
from d3etr_hf.models.dab_detr import D3etrDabDetrForObjectDetection
from d3etr_hf.models.deformable_detr import D3etrDeformableDetrForObjectDetection
from d3etr_hf.models.deimv2 import D3etrDeimv2ForObjectDetection
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.detr import D3etrDetrForObjectDetection
from d3etr_hf.models.lw_detr import D3etrLwDetrForObjectDetection
from d3etr_hf.models.rf_detr import D3etrRfDetrForObjectDetection
from d3etr_hf.models.rt_detr import D3etrRTDetrForObjectDetection
from d3etr_hf.models.rt_detr_v2 import D3etrRTDetrV2ForObjectDetection
from d3etr_hf.models.table_transformer import D3etrTableTransformerForObjectDetection

__all__ = [
    "D3etrConditionalDetrForObjectDetection",
    "D3etrDFineForObjectDetection",
    "D3etrDabDetrForObjectDetection",
    "D3etrDeformableDetrForObjectDetection",
    "D3etrDeimv2ForObjectDetection",
    "D3etrDetrForObjectDetection",
    "D3etrLwDetrForObjectDetection",
    "D3etrRfDetrForObjectDetection",
    "D3etrRTDetrForObjectDetection",
    "D3etrRTDetrV2ForObjectDetection",
    "D3etrTableTransformerForObjectDetection",
    "Detector",
]
