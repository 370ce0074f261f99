"""FGD (Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022), on the encoder's memory.

With the teacher's features F and the student's G, carried into its width, of one image and level (focal distillation,
section 3.1, and global distillation, section 3.2):

- masks: of foreground, cells that an object covers, each weighted by one over the number of cells of its object, of
  several the smallest; of background, all others, weighted by one over their number;
- attention, at temperature T: of places, n softmax(mean over channels of |F| / T) over the image's n tokens; of
  channels, d softmax(mean over tokens of |F| / T) over the d channels;
- feature loss: (F - G)^2 weighted by mask and the teacher's two attentions, foreground and background apart;
- attention loss: L1 of the two models' attentions;
- global loss: (R(F) - R(G))^2, where R adds a learned context to all tokens, see `RelationBlock`.

The paper's weights (for RetinaNet 1e-3, 5e-4, 1e-3 and 5e-6) are of sums over channels and cells. Here every part is a
mean: over channels, and of foreground over objects, of background over its cells, of attention over tokens and over
channels, of the global loss over both. Between them the parts weigh 1, 0.5, 1 and 1: foreground and background as in
the paper, and the whole is of the size of a few mean squared errors, so that a weight of 1 is sensible.
"""

from collections.abc import Sequence

import torch

from d3etr_hf.losses.memory_cells import foreground_weights, mean_over
from d3etr_hf.outputs import ComparedLevel, Targets

TEMPERATURE = 0.5
BACKGROUND_WEIGHT = 0.5


def fgd_distillation(
    levels: Sequence[ComparedLevel],
    targets: Targets,
    images: float | torch.Tensor,
    objects: float | torch.Tensor,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Focal, attention and global loss of memories, padding left out.

    Args:
        levels: `(B, d_t, H, W)` each, with the contexts of the relation blocks, `(B, d_t)`.
        targets: the ground truth, whose boxes are the foreground.
        images, objects: number of images and of objects that means go over (of all processes, divided by their
            number).
        temperature: of the attentions.

    Returns:
        `(levels,)`: per level, foreground / objects + (background / 2 + attention + global) / images.
    """
    return torch.stack([_of_level(level, targets, images, objects, temperature) for level in levels])


def _of_level(
    level: ComparedLevel,
    targets: Targets,
    images: float | torch.Tensor,
    objects: float | torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    mask = level.mask
    theirs = attentions(level.teacher, mask, temperature)
    ours = attentions(level.student, mask, temperature)
    difference = level.teacher - level.student
    squares = theirs[0] * (theirs[1][..., None, None] * difference.square()).mean(1)
    foreground = foreground_weights(targets, mask).to(squares.dtype)
    background = mask & (foreground == 0)
    apart = mean_over((theirs[0] - ours[0]).abs(), mask) + (theirs[1] - ours[1]).abs().mean(1)
    context = (level.teacher_context - level.student_context)[..., None, None]
    related = mean_over((difference + context).square().mean(1), mask)
    of_images = BACKGROUND_WEIGHT * mean_over(squares, background) + apart + related
    return (foreground * squares).sum() / objects + of_images.sum() / images


def attentions(features: torch.Tensor, mask: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where and in which channels features are large.

    Args:
        features: `(B, d, H, W)`; mask: bool `(B, H, W)`.

    Returns:
        Of places `(B, H, W)`, with mean 1 over the image's tokens and 0 on padding, and of channels `(B, d)`, with
        mean 1.
    """
    size, tokens = features.abs(), mask.sum(dim=(1, 2))
    by_place = (size.mean(1) / temperature).masked_fill(~mask, -torch.inf).flatten(1).softmax(-1).view_as(mask)
    by_channel = ((size * mask[:, None]).sum(dim=(2, 3)) / tokens[:, None] / temperature).softmax(-1)
    return tokens[:, None, None] * by_place, features.shape[1] * by_channel
