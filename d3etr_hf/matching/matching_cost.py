"""What it costs to match a teacher's prediction with a student's, for all pairs at once."""

import torch

from d3etr_hf.outputs import Scores, wide
from d3etr_hf.outputs.boxes import generalised_iou

# pairs of predictions whose costs are computed at once: temporaries then stay in a processor's cache, where one call
# for everything would spend most of its time on fresh memory
PAIRS_AT_ONCE = 2**20


@torch.no_grad()
def prediction_cost(
    teacher_probabilities: torch.Tensor,
    teacher_boxes: torch.Tensor,
    student_logits: torch.Tensor,
    student_boxes: torch.Tensor,
    scores: Scores,
    weights: tuple[float, float, float],
) -> torch.Tensor:
    """Cost between all teacher and all student predictions, without gradient (README, the method).

    `class * entropy(teacher's probabilities, student's logits) + l1 * L1 - giou * GIoU`.

    Args:
        teacher_probabilities: `(L, B, N_t, C)`, of objects, 0..1.
        student_logits: `(L, B, N_s, ·)`, which `scores` reads.
        teacher_boxes, student_boxes: `(L, B, N_t, 4)` and `(L, B, N_s, 4)`, cxcywh in 0..1.
        weights: of class, L1 and GIoU.

    Returns:
        `(L, B, N_t, N_s)`, float32 or wider.
    """
    tensors = teacher_probabilities, teacher_boxes, student_logits, student_boxes
    images = [wide(tensor).flatten(0, 1) for tensor in tensors]
    pairs = teacher_probabilities.shape[2] * student_logits.shape[2]
    chunks = zip(*(tensor.split(max(1, PAIRS_AT_ONCE // pairs)) for tensor in images), strict=True)
    with torch.autocast(student_logits.device.type, enabled=False):
        cost = torch.cat([_cost_of_images(chunk, scores, weights) for chunk in chunks])
    return cost.unflatten(0, teacher_probabilities.shape[:2])


def _cost_of_images(chunk: tuple[torch.Tensor, ...], scores: Scores, weights: tuple[float, ...]) -> torch.Tensor:
    teacher_probabilities, teacher_boxes, student_logits, student_boxes = chunk
    class_weight, l1_weight, giou_weight = weights
    cost = scores.pairwise_entropy(student_logits, teacher_probabilities)
    cost.mul_(class_weight).add_(torch.cdist(teacher_boxes, student_boxes, p=1), alpha=l1_weight)
    return cost.sub_(generalised_iou(teacher_boxes[:, :, None], student_boxes[:, None]), alpha=giou_weight)
