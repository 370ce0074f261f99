"""Matching: predictions to predictions (MixMatcher) and ground truth to predictions (label assignment)."""

from d3etr_hf.errors import NonFiniteCostError
from d3etr_hf.matching.label_assignment import NO_OBJECT, HungarianAssigner, Targets
from d3etr_hf.matching.mix_matcher import (
    AdaptiveMatcher,
    FixedMatcher,
    MatchedPairs,
    MixMatcher,
    matched_foreground_share,
)
from d3etr_hf.matching.solver import prediction_cost

__all__ = [
    "NO_OBJECT",
    "AdaptiveMatcher",
    "FixedMatcher",
    "HungarianAssigner",
    "MatchedPairs",
    "MixMatcher",
    "NonFiniteCostError",
    "Targets",
    "matched_foreground_share",
    "prediction_cost",
]
