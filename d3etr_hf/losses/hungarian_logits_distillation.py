"""Hungarian-matching logits distillation, of DETRDistill: positives teach class and box, negatives their box alone.

Chang et al., "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families", ICCV 2023. A teacher's
query is positive where ground truth is assigned to it in that layer. With the pairs (i, j) of a bipartite matching of
all predictions, decoder layer k of the student learns from the teacher's layer that it follows

    alpha sum over positive i of (class_ij + l1_ij + giou_ij) + beta sum over negative i of (l1_ij + giou_ij)

(their equations 3 and 4, added up stage by stage), since a negative's class is background whatever its box.
"""

import torch

from d3etr_hf.losses.prediction_distillation import of_queries
from d3etr_hf.matching import MatchedPairs, TaughtGroup
from d3etr_hf.outputs import GroupOutput, Scores
from d3etr_hf.outputs.boxes import generalised_iou


def hungarian_logits_distillation(
    teacher: TaughtGroup,
    student: GroupOutput,
    pairs: MatchedPairs,
    positive: torch.Tensor,
    scores: Scores,
    weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the positive and over the negative pairs, for their callers to divide and to weigh.

    Args:
        teacher: class probabilities `(L, B, N_t, C)` and boxes `(L, B, N_t, 4)` cxcywh in 0..1.
        student: logits `(L, B, N_s, ·)` over the same classes, and boxes.
        pairs: the matching, `(L, B, P)`.
        positive: bool `(L, B, N_t)`, the teacher's queries that hold an object.
        scores: how the student's logits are read.
        weights: of class (cross-entropy against the teacher's probabilities), L1 and 1 - GIoU.

    Returns:
        `(L,)` of the positives and `(L,)` of the negatives.
    """
    class_weight, l1_weight, giou_weight = weights
    target = of_queries(teacher.probabilities, pairs.teacher)
    classes = class_weight * scores.entropy(of_queries(student.logits, pairs.student), target)
    theirs, ours = of_queries(teacher.boxes, pairs.teacher), of_queries(student.boxes, pairs.student)
    boxes = l1_weight * (ours - theirs).abs().sum(-1) + giou_weight * (1 - generalised_iou(ours, theirs))
    holds_object = positive.take_along_dim(pairs.teacher, dim=-1)
    counts = torch.ones_like(holds_object) if pairs.counted is None else pairs.counted
    of_positives, of_negatives = (holds_object & counts) * (classes + boxes), (~holds_object & counts) * boxes
    return of_positives.sum(dim=(1, 2)), of_negatives.sum(dim=(1, 2))
