"""Matching: predictions to predictions (MixMatcher) and ground truth to predictions (label assignment)."""

from .costs import NonFiniteCostError, prediction_cost
from .label_assignment import NO_OBJECT, HungarianAssigner, Targets
from .mix_matcher import AdaptiveMatcher, FixedMatcher, MatchedPairs, MixMatcher, matched_foreground_share

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
