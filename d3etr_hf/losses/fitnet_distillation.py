"""FitNet (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015), on the encoder's memory.

The paper's equation 3 is half the squared distance of the teacher's hint and a learned regressor of the student's
features, summed. A sum grows with the image and the width, so here it is the mean over image tokens and channels, not
halved: with the unit variance of normed memories it starts near 2, and a weight of 1 is like that of a detection loss.
"""

from collections.abc import Sequence

import torch

from d3etr_hf.losses.memory_cells import mean_over
from d3etr_hf.outputs import ComparedLevel


def fitnet_distillation(levels: Sequence[ComparedLevel], images: float | torch.Tensor) -> torch.Tensor:
    """Mean squared error of memories, padding left out; tokens of an image weigh the same.

    Args:
        levels: what the student's regressor made of its memory, `(B, d_t, H, W)`, beside the teacher's.
        images: number of images that the mean goes over (of all processes, divided by their number).

    Returns:
        `(levels,)`: per level, the mean over images.
    """
    losses = [mean_over((level.teacher - level.student).square().mean(1), level.mask).sum() for level in levels]
    return torch.stack(losses) / images
