"""Matching: predictions to predictions (MixMatcher) and ground truth to predictions (label assignment)."""

from d3etr_hf.matching.label_assignment import assignment_of, assignment_problem, probabilities_of
from d3etr_hf.matching.mix_matcher import (
    AdaptiveMatcher,
    MatchedPairs,
    TaughtGroup,
    fixed_pairs,
    matched_foreground_share,
)
from d3etr_hf.matching.solver import Problem, Solution, solve, start_solving

__all__ = [
    "AdaptiveMatcher",
    "MatchedPairs",
    "Problem",
    "Solution",
    "TaughtGroup",
    "assignment_of",
    "assignment_problem",
    "fixed_pairs",
    "matched_foreground_share",
    "probabilities_of",
    "solve",
    "start_solving",
]
