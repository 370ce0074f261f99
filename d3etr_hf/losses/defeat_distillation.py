"""DeFeat (Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021), on the encoder's memory.

The paper's loss of features: squared differences of foreground and of background apart, each divided by twice the
number of its cells, so that neither drowns the other. Its decoupled proposals are two-stage detectors' and have no
counterpart here. The paper sums over channels and weighs the two parts by the detector; here each is also a mean
over channels and they weigh the same, so that a weight of 1 is sensible.
"""

from collections.abc import Sequence

import torch

from d3etr_hf.losses.memory_cells import covered_cells, mean_over
from d3etr_hf.outputs import ComparedLevel, Targets


def defeat_distillation(
    levels: Sequence[ComparedLevel], targets: Targets, images: float | torch.Tensor
) -> torch.Tensor:
    """Half the mean squared error over foreground plus half of that over background, padding left out.

    Args:
        levels: what the student's adaptation layer made of its memory, `(B, d_t, H, W)`, beside the teacher's.
        targets: the ground truth, whose boxes are the foreground.
        images: number of images that the mean goes over (of all processes, divided by their number).

    Returns:
        `(levels,)`: per level, the mean over images; what has no foreground, or no background, adds nothing for it.
    """
    losses = []
    for level in levels:
        squares = (level.teacher - level.student).square().mean(1)
        foreground = covered_cells(targets, level.mask).any(1)
        parts = mean_over(squares, foreground) + mean_over(squares, level.mask & ~foreground)
        losses.append(parts.sum() / 2)
    return torch.stack(losses) / images
