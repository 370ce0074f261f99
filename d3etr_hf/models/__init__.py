"""Detectors that emit, per decoder layer and query group, predictions and attention maps in one common type."""

from d3etr_hf.models.auxiliary_queries import AuxiliaryQueries
from d3etr_hf.models.conditional_detr import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.initialisation import freeze_as_in_paper, inherit_from_teacher, initialise_as_in_paper
from d3etr_hf.models.outputs import AttentionMap, DetectorOutput, QueryGroupOutput

__all__ = [
    "AttentionMap",
    "AuxiliaryQueries",
    "D3etrConditionalDetrForObjectDetection",
    "DetectorOutput",
    "QueryGroupOutput",
    "freeze_as_in_paper",
    "inherit_from_teacher",
    "initialise_as_in_paper",
]
