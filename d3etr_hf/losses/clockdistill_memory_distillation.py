"""CLoCKDistill's memory distillation (Lan & Tian, "CLoCKDistill: Consistent Location-and-Context-aware Knowledge
Distillation for DETRs", arXiv 2502.10683), on the encoder's memory.

The paper distils what the encoder makes of an image, which holds its global context, instead of backbone features, and
the ground truth says where objects are. With the teacher's memory A and the student's A' of an image, it takes

    alpha sum M S (A - A')^2 + beta sum (1 - M) S (A - A')^2

over cells and channels, with M = 1 inside of a box and else 0, and S one over the number of the box's cells, or of
those of background: FGD's focal loss without its attentions. The formula, alpha = 5e-5 and beta = 1e-7 are known here
from an account of the paper in other code, not from its authors'.

Ours: where boxes overlap the smallest counts, as in FGD; cells that a box covers in part are inside of it; a memory
of several levels is compared level by level; where the widths differ a matrix a level carries the student's. Every
part is a mean: over channels, and of foreground over objects, of background over its cells and images. Between them
they weigh 1 and beta / alpha, so that a weight of 1 is sensible.

The paper's other half, queries made of the ground truth that both decoders are given so that their predictions can be
compared, is `shared_object_queries`, see `training.shared_queries`.
"""

from collections.abc import Sequence

import torch

from d3etr_hf.losses.memory_cells import foreground_weights, mean_over
from d3etr_hf.outputs import ComparedLevel, Targets

BACKGROUND_WEIGHT = 1e-7 / 5e-5


def clockdistill_memory_distillation(
    levels: Sequence[ComparedLevel], targets: Targets, images: float | torch.Tensor, objects: float | torch.Tensor
) -> torch.Tensor:
    """Squared differences of memories where objects are, and a little of them elsewhere, padding left out.

    Args:
        levels: the student's memory in the teacher's width, `(B, d_t, H, W)`, beside the teacher's.
        targets: the ground truth, whose boxes are the foreground.
        images, objects: number of images and of objects that means go over (of all processes, divided by their
            number).

    Returns:
        `(levels,)`: per level, foreground / objects + `BACKGROUND_WEIGHT` background / images.
    """
    losses = []
    for level in levels:
        squares = (level.teacher - level.student).square().mean(1)
        foreground = foreground_weights(targets, level.mask).to(squares.dtype)
        background = mean_over(squares, level.mask & (foreground == 0))
        losses.append((foreground * squares).sum() / objects + BACKGROUND_WEIGHT * background.sum() / images)
    return torch.stack(losses)
