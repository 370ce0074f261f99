"""ViDT's distillation by token matching (Song et al., "ViDT: An Efficient and Effective Fully Transformer-based Object
Detector", ICLR 2022), on the encoder's memory and the last decoder layer's queries.

The paper's loss: the mean over patch tokens of the Euclidean distance of both models' tokens, plus the mean over
detection tokens of the same, each token compared with the one at its own place. Here patch tokens are those of the
memory, and detection tokens the queries of the models' own groups after the last decoder layer, the first with the
first and so on, which asks for as many of them. A distance grows with the root of the width, so here it is divided by
that: it is the root mean squared difference of a token's channels, for which a weight of 1 is sensible.
"""

from collections.abc import Sequence

import torch

from d3etr_hf.losses.memory_cells import mean_over
from d3etr_hf.outputs import ComparedLevel, wide


def vidt_distillation(
    levels: Sequence[ComparedLevel],
    teacher_queries: torch.Tensor,
    student_queries: torch.Tensor,
    images: float | torch.Tensor,
) -> torch.Tensor:
    """Distances of tokens of the memory and of queries, place by place, padding left out.

    Args:
        levels: the student's memory in the teacher's width, `(B, d_t, H, W)`, beside the teacher's.
        teacher_queries, student_queries: `(B, N, d_t)`, after the last decoder layer; the student's in the teacher's
            width.
        images: number of images that the mean goes over (of all processes, divided by their number).

    Returns:
        `(levels,)`: per level, the mean over images of the mean over its tokens plus that over all queries.
    """
    of_queries = _distance(wide(teacher_queries) - wide(student_queries), dim=-1).mean(1)
    of_tokens = [mean_over(_distance(level.teacher - level.student, dim=1), level.mask) for level in levels]
    return torch.stack([(tokens + of_queries).sum() for tokens in of_tokens]) / images


def _distance(difference: torch.Tensor, dim: int) -> torch.Tensor:
    """Root mean square along an axis; its gradient at zero is zero."""
    return torch.linalg.vector_norm(difference, dim=dim) / difference.shape[dim] ** 0.5
