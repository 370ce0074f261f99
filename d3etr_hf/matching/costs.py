"""Matching costs in batched tensor operations; the assignments they lead to, through scipy."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from ..boxes import generalised_iou


class NonFiniteCostError(ValueError):
    """A matching cost is NaN or infinite: the predictions have diverged.

    Attributes:
        layer, image: position of the first such cost in the batch.
    """

    def __init__(self, what: str, layer: int, image: int):
        super().__init__(
            f"{what}: the matching cost of decoder layer {layer}, image {image} of the batch is NaN or infinite, so "
            "the predictions have diverged (if the teacher's: try it by scripts/evaluate.py; if the student's: lower "
            "the learning rate)"
        )
        self.what, self.layer, self.image = what, layer, image


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def prediction_cost(
    teacher_logits: torch.Tensor,
    teacher_boxes: torch.Tensor,
    student_logits: torch.Tensor,
    student_boxes: torch.Tensor,
    class_weight: float,
    l1_weight: float,
    giou_weight: float,
) -> torch.Tensor:
    """Cost between all teacher and all student predictions (README, the method).

    `class_weight * sum_c BCE(teacher score, student score) + l1_weight * L1 - giou_weight * GIoU`, with the teacher's
    scores as soft targets.

    Args:
        teacher_logits, student_logits: `(..., N_t, C)` and `(..., N_s, C)` before the sigmoid.
        teacher_boxes, student_boxes: `(..., N_t, 4)` and `(..., N_s, 4)`, cxcywh in 0..1.

    Returns:
        `(..., N_t, N_s)`, float32 or wider.
    """
    student_logits, target = wide(student_logits), wide(teacher_logits).sigmoid()
    # sum_c BCE(p, x) = sum_c softplus(x) - p x: one matrix product for all pairs
    class_cost = nn.functional.softplus(student_logits).sum(-1)[..., None, :] - target @ student_logits.mT
    teacher_boxes, student_boxes = wide(teacher_boxes), wide(student_boxes)
    l1_cost = torch.cdist(teacher_boxes, student_boxes, p=1)
    giou = generalised_iou(teacher_boxes[..., :, None, :], student_boxes[..., None, :, :])
    return class_weight * class_cost + l1_weight * l1_cost - giou_weight * giou


def assign(cost: torch.Tensor, what: str, sizes: list[int] | None = None) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Minimum-cost bipartite assignment for every layer and image, after one transfer to the host.

    Args:
        cost: `(L, B, rows, columns)`.
        what: what is being matched, for the error.
        sizes: per image, how many columns count; all by default.

    Returns:
        Per layer, per image: row indices and column indices, `min(rows, columns)` of each, rows ascending.

    Raises:
        NonFiniteCostError: a cost that counts is NaN or infinite (scipy would match NaN in silence).
    """
    host = cost.detach().cpu().numpy()
    sizes = sizes or [host.shape[-1]] * host.shape[1]
    assignments = []
    for layer, images in enumerate(host):
        assignments.append([])
        for image, (matrix, size) in enumerate(zip(images, sizes, strict=True)):
            if not np.isfinite(matrix[:, :size]).all():
                raise NonFiniteCostError(what, layer, image)
            assignments[-1].append(linear_sum_assignment(matrix[:, :size]))
    return assignments
