"""The detection loss of Conditional DETR, for all layers at once and any assignment."""

import torch
from torch import nn

from d3etr_hf.matching import NO_OBJECT, Targets
from d3etr_hf.matching.boxes import generalised_iou
from d3etr_hf.matching.solver import wide
from d3etr_hf.models.outputs import QueryGroupOutput


def detection_losses(
    group: QueryGroupOutput,
    targets: Targets,
    assignment: torch.Tensor,
    boxes: float | torch.Tensor,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> dict[str, torch.Tensor]:
    """Focal loss over all queries and classes, L1 and GIoU loss over the queries that hold an object.

    The original criterion's formula: each sum is divided by the number of boxes, once (Transformers divides that
    number by the world size twice).

    Args:
        group: logits `(L, B, N, C)`, boxes `(L, B, N, 4)` cxcywh in 0..1.
        targets: the ground truth.
        assignment: int64 `(L, B, N)`, the object of each query or `NO_OBJECT`.
        boxes: number of ground-truth boxes (of all processes, divided by their number).

    Returns:
        "class", "l1" and "giou", unweighted, `(L,)` each.
    """
    logits, predicted = wide(group.logits), wide(group.boxes)
    holds_object = (assignment != NO_OBJECT).to(logits.dtype)
    if targets.class_labels.shape[1] == 0:  # no object in the whole batch: nothing to gather from
        target_classes, target_boxes = torch.zeros_like(assignment), torch.full_like(predicted, 0.5)
    else:
        index = assignment.clamp(min=0)
        target_classes = targets.class_labels.expand(len(index), -1, -1).gather(-1, index)
        all_boxes = targets.boxes.to(predicted.dtype).expand(len(index), -1, -1, -1)
        target_boxes = all_boxes.take_along_dim(index[..., None], dim=2)
    one_hot = torch.zeros_like(logits).scatter(-1, target_classes[..., None], holds_object[..., None])
    scores = logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    missed = one_hot * (1 - scores) + (1 - one_hot) * scores
    alpha = focal_alpha * one_hot + (1 - focal_alpha) * (1 - one_hot)
    losses = {
        "class": (alpha * missed**focal_gamma * entropy).sum(dim=(1, 2, 3)),
        "l1": (holds_object * (predicted - target_boxes).abs().sum(-1)).sum(dim=(1, 2)),
        "giou": (holds_object * (1 - generalised_iou(predicted, target_boxes))).sum(dim=(1, 2)),
    }
    return {name: value / boxes for name, value in losses.items()}
