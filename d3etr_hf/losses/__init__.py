"""Losses: pure functions of outputs, pairs and targets; every one returns a value per decoder layer."""

from d3etr_hf.losses.attention_distillation import (
    DIVERGENCES,
    cross_attention_distillation,
    self_attention_distillation,
)
from d3etr_hf.losses.attention_geometry import moment_distillation, place_distillation, space_of
from d3etr_hf.losses.box_distribution_distillation import box_distribution_distillation
from d3etr_hf.losses.clockdistill_memory_distillation import clockdistill_memory_distillation
from d3etr_hf.losses.defeat_distillation import defeat_distillation
from d3etr_hf.losses.detection_loss import CrossEntropyCriterion, DetectionCriterion, FocalCriterion
from d3etr_hf.losses.detrdistill_memory_distillation import detrdistill_memory_distillation, query_quality
from d3etr_hf.losses.distribution_criterion import DistributionCriterion
from d3etr_hf.losses.fgd_distillation import fgd_distillation
from d3etr_hf.losses.fitnet_distillation import fitnet_distillation
from d3etr_hf.losses.hungarian_logits_distillation import hungarian_logits_distillation
from d3etr_hf.losses.icd_distillation import icd_distillation
from d3etr_hf.losses.overlap_criteria import IouAwareCriterion, VarifocalCriterion
from d3etr_hf.losses.prediction_distillation import PREDICTION_NORMALISERS, pair_weights, prediction_distillation
from d3etr_hf.losses.vidt_distillation import vidt_distillation

__all__ = [
    "DIVERGENCES",
    "PREDICTION_NORMALISERS",
    "CrossEntropyCriterion",
    "DetectionCriterion",
    "DistributionCriterion",
    "FocalCriterion",
    "IouAwareCriterion",
    "VarifocalCriterion",
    "box_distribution_distillation",
    "clockdistill_memory_distillation",
    "cross_attention_distillation",
    "defeat_distillation",
    "detrdistill_memory_distillation",
    "fgd_distillation",
    "fitnet_distillation",
    "icd_distillation",
    "hungarian_logits_distillation",
    "moment_distillation",
    "pair_weights",
    "place_distillation",
    "prediction_distillation",
    "query_quality",
    "self_attention_distillation",
    "space_of",
    "vidt_distillation",
]
