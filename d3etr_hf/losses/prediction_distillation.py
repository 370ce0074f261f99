"""Prediction distillation: the teacher's class scores and boxes as soft targets (README, the method)."""

import torch
from torch import nn

from d3etr_hf.matching import MatchedPairs
from d3etr_hf.matching.boxes import generalised_iou
from d3etr_hf.matching.solver import wide
from d3etr_hf.models.outputs import QueryGroupOutput

PREDICTION_NORMALISERS = ("pairs", "boxes")


@torch.no_grad()
def pair_weights(teacher_logits: torch.Tensor, pairs: MatchedPairs, normaliser: str = "pairs") -> torch.Tensor:
    """How much each pair counts: `(L, B, P)`.

    "pairs" gives every pair 1; "boxes" gives it the teacher's highest class score, so that background pairs do not
    drown the foreground.

    Args:
        teacher_logits: `(L, B, N_t, C)`.
    """
    if normaliser == "pairs":
        return torch.ones(pairs.teacher.shape, dtype=wide(teacher_logits).dtype, device=teacher_logits.device)
    if normaliser == "boxes":
        return wide(teacher_logits).amax(-1).sigmoid().gather(-1, pairs.teacher)
    raise ValueError(f"prediction normaliser {normaliser!r}: choose one of {PREDICTION_NORMALISERS}")


def prediction_distillation(
    teacher: QueryGroupOutput,
    student: QueryGroupOutput,
    pairs: MatchedPairs,
    weights: torch.Tensor,
    total_weight: torch.Tensor,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> torch.Tensor:
    """`class_weight * sum_c BCE + l1_weight * L1 + giou_weight * (1 - GIoU)` of matched predictions.

    Args:
        teacher, student: logits `(L, B, N, C)` of the same classes, boxes `(L, B, N, 4)` cxcywh in 0..1.
        pairs: the matching, `(L, B, P)`.
        weights: of each pair, `(L, B, P)`, as `pair_weights` gives them.
        total_weight: `(L,)`, what each layer's weighted sum is divided by (the weights' sum over all processes,
            divided by their number).

    Returns:
        `(L,)`, the weighted mean of each layer.
    """
    target = _of(teacher.logits, pairs.teacher).sigmoid()
    per_pair = class_weight * nn.functional.binary_cross_entropy_with_logits(
        _of(student.logits, pairs.student), target, reduction="none"
    ).sum(-1)
    teacher_boxes, boxes = _of(teacher.boxes, pairs.teacher), _of(student.boxes, pairs.student)
    per_pair = per_pair + l1_weight * (boxes - teacher_boxes).abs().sum(-1)
    per_pair = per_pair + giou_weight * (1 - generalised_iou(boxes, teacher_boxes))
    return (weights * per_pair).sum(dim=(1, 2)) / total_weight


def _of(predictions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(L, B, N, F)` and `(L, B, P)` to `(L, B, P, F)`, float32 or wider."""
    return wide(predictions).gather(2, index[..., None].expand(*index.shape, predictions.shape[-1]))
