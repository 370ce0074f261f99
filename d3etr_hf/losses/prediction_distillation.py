"""Prediction distillation: the teacher's class probabilities and boxes as soft targets (README, the method)."""

import torch

from d3etr_hf.matching import MatchedPairs, TaughtGroup
from d3etr_hf.outputs import GroupOutput, Scores, wide
from d3etr_hf.outputs.boxes import generalised_iou

PREDICTION_NORMALISERS = ("pairs", "boxes")


@torch.no_grad()
def pair_weights(probabilities: torch.Tensor, pairs: MatchedPairs, normaliser: str = "pairs") -> torch.Tensor:
    """How much each pair counts: `(L, B, P)`, nothing where the pair is not counted.

    "pairs" gives every pair 1; "boxes" gives it the teacher's highest class score, so that background pairs do not
    drown the foreground.

    Args:
        probabilities: the teacher's, `(L, B, N_t, C)`.
    """
    if normaliser == "pairs":
        weights = torch.ones(pairs.teacher.shape, dtype=wide(probabilities).dtype, device=probabilities.device)
    elif normaliser == "boxes":
        weights = wide(probabilities).amax(-1).gather(-1, pairs.teacher)
    else:
        raise ValueError(f"prediction normaliser {normaliser!r}: choose one of {PREDICTION_NORMALISERS}")
    return weights if pairs.counted is None else weights * pairs.counted


def prediction_distillation(
    teacher: TaughtGroup,
    student: GroupOutput,
    pairs: MatchedPairs,
    scores: Scores,
    pair_weight: torch.Tensor,
    total_weight: torch.Tensor,
    weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
) -> torch.Tensor:
    """`class * entropy + l1 * L1 + giou * (1 - GIoU)` of matched predictions.

    Args:
        teacher: class probabilities `(L, B, N_t, C)` and boxes `(L, B, N_t, 4)` cxcywh in 0..1.
        student: logits `(L, B, N_s, ·)` over the same classes, and boxes.
        pairs: the matching, `(L, B, P)`.
        scores: how the student's logits are read.
        pair_weight: of each pair, `(L, B, P)`, as `pair_weights` gives them.
        total_weight: `(L,)`, what each layer's weighted sum is divided by (the weights' sum over all processes,
            divided by their number).
        weights: of class, L1 and GIoU.

    Returns:
        `(L,)`, the weighted mean of each layer.
    """
    class_weight, l1_weight, giou_weight = weights
    target = of_queries(teacher.probabilities, pairs.teacher)
    per_pair = class_weight * scores.entropy(of_queries(student.logits, pairs.student), target)
    teacher_boxes, boxes = of_queries(teacher.boxes, pairs.teacher), of_queries(student.boxes, pairs.student)
    per_pair = per_pair + l1_weight * (boxes - teacher_boxes).abs().sum(-1)
    per_pair = per_pair + giou_weight * (1 - generalised_iou(boxes, teacher_boxes))
    return (pair_weight * per_pair).sum(dim=(1, 2)) / total_weight


def of_queries(predictions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(L, B, N, F)` and `(L, B, P)` to `(L, B, P, F)`, float32 or wider."""
    return wide(predictions).gather(2, index[..., None].expand(*index.shape, predictions.shape[-1]))
