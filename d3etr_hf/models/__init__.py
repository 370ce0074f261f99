"""Detectors that emit, per decoder layer and query group, predictions and attention maps in one common type."""

from .conditional_detr import D3etrConditionalDetrForObjectDetection
from .initialisation import freeze_as_in_paper, inherit_from_teacher, initialise_as_in_paper
from .outputs import AttentionMap, DetectorOutput, QueryGroupOutput
from .query_groups import AuxiliaryQueries

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
