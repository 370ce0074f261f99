"""DETRDistill's target-aware feature distillation (Chang et al., ICCV 2023), on the encoder's memory.

Equations 6 to 9: the difference of features is weighted by a mask that the teacher's object queries make, a sum over
queries of how alike query and token are, times the query's quality, score^g IoU^(1 - g) of the object that it answers
for (0 where it answers for none). Likeness is the cosine; as in the authors' code the mask is divided by its largest
value in the image and not below 0.01, which is all that is left of it where no query answers for an object. Queries
are those of the last decoder layer, g is 0.5 and, as in the paper, the loss is a mean over channels and tokens, for
which a weight of 1 is sensible.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from d3etr_hf.losses.memory_cells import mean_over
from d3etr_hf.outputs import NO_OBJECT, ComparedLevel, Targets, wide
from d3etr_hf.outputs.boxes import iou

SCORE_EXPONENT = 0.5
LEAST_MASK = 0.01


@torch.no_grad()
def query_quality(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    assignment: torch.Tensor,
    targets: Targets,
    exponent: float = SCORE_EXPONENT,
) -> torch.Tensor:
    """How well each query finds the object that was assigned to it.

    Args:
        probabilities: the teacher's, `(B, N, C)`.
        boxes: the teacher's, `(B, N, 4)`, cxcywh in 0..1.
        assignment: int64 `(B, N)`, the object of each query or `NO_OBJECT`.
        targets: the ground truth.
        exponent: g, of the score.

    Returns:
        `(B, N)`, in 0..1.
    """
    if targets.boxes.shape[1] == 0:
        return torch.zeros_like(boxes[..., 0])
    place = assignment.clamp(min=0)
    classes = targets.class_labels.take_along_dim(place, dim=1)
    score = probabilities.take_along_dim(classes[..., None], dim=-1)[..., 0]
    overlap = iou(boxes, targets.boxes.to(boxes.dtype).take_along_dim(place[..., None], dim=1))
    return torch.where(assignment == NO_OBJECT, 0, score**exponent * overlap ** (1 - exponent))


def detrdistill_memory_distillation(
    levels: Sequence[ComparedLevel], queries: torch.Tensor, quality: torch.Tensor, images: float | torch.Tensor
) -> torch.Tensor:
    """Mean squared error of memories where the teacher's good queries look alike, padding left out.

    Args:
        levels: what the student's projection made of its memory, `(B, d_t, H, W)`, beside the teacher's.
        queries: `(B, N, d_t)`, the teacher's after its last decoder layer.
        quality: `(B, N)`, of each of them, see `query_quality`.
        images: number of images that the mean goes over (of all processes, divided by their number).

    Returns:
        `(levels,)`: per level, the mean over images of the mean over tokens and channels.
    """
    losses = []
    for level in levels:
        weight = target_mask(level, queries, quality).square()
        losses.append(mean_over(weight * (level.teacher - level.student).square().mean(1), level.mask).sum())
    return torch.stack(losses) / images


@torch.no_grad()
def target_mask(level: ComparedLevel, queries: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """`(B, H, W)`: how much each token of the teacher's belongs to what its queries have found, 0.01 to 1."""
    found = (quality[..., None] * normalize(wide(queries), dim=-1)).sum(1)
    likeness = (found[..., None, None] * normalize(level.teacher, dim=1)).sum(1)
    highest = likeness.masked_fill(~level.mask, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return (likeness / highest.clamp(min=torch.finfo(likeness.dtype).tiny)).clamp(min=LEAST_MASK, max=1.0)
