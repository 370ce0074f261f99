"""What is learned to compare a student's memory with its teacher's, part of the student only while it trains.

These modules stand beside the query adapters: they are trained, kept in checkpoints and left out of what is saved.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from d3etr_hf.outputs import ComparedLevel, Targets

VIDT = "vidt"


class ComparesMemory(nn.Module):
    """A module that takes the levels of two memories, `ComparedLevel`s, and the ground truth, in training.

    Attributes:
        reads_ground_truth: whether the method's loss depends on it; so unless it says otherwise.
    """

    reads_ground_truth: ClassVar[bool] = True


class MemoryAdapter(ComparesMemory):
    """Carries every level of the student's memory into the teacher's width, each by a convolution of its own.

    It starts with orthonormal rows or columns at the kernel's centre and zeros around it, so that features of unit
    variance keep it.

    Args:
        width, their_width: hidden sizes of the student and of the teacher.
        levels: number of levels of the student's memory.
        classes: whatever number of classes the student has.

    Attributes:
        kernel: side of the convolution, cells; it sees zeros on padding as beyond the map.
        always: whether there is one where the widths are equal; else the student's features are compared as they are.
    """

    kernel: ClassVar[int] = 1
    always: ClassVar[bool] = True

    def __init__(self, width: int, their_width: int, levels: int, classes: int):
        super().__init__()
        learned = self.always or width != their_width
        self.projections = nn.ModuleList(
            self._convolution(width, their_width) if learned else nn.Identity() for _ in range(levels)
        )

    def _convolution(self, width: int, their_width: int) -> nn.Conv2d:
        convolution = nn.Conv2d(width, their_width, self.kernel, padding=self.kernel // 2)
        centre = torch.empty(their_width, width)
        nn.init.orthogonal_(centre, gain=math.sqrt(max(1.0, their_width / width)))
        nn.init.zeros_(convolution.bias)
        with torch.no_grad():
            convolution.weight.zero_()[..., self.kernel // 2, self.kernel // 2] = centre
        return convolution

    def forward(self, levels: Sequence[ComparedLevel], targets: Targets) -> tuple[ComparedLevel, ...]:
        """The same levels, with the student's features in the teacher's width."""
        return tuple(
            level._replace(student=projection(level.student * level.mask[:, None]))
            for level, projection in zip(levels, self.projections, strict=True)
        )


class FitnetAdapter(MemoryAdapter):
    """FitNet's regressor: one matrix a level, whatever the widths."""

    reads_ground_truth = False


class RelationBlock(nn.Module):
    """FGD's global relation R (its section 3.2) without the features themselves: what it adds to every token.

    W2 ReLU(LayerNorm(W1 c)), with c the mean of tokens weighted by softmax(w . token); W2 starts at zero.

    Args:
        width: of the features; the block narrows to half of it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weigh = nn.Linear(width, 1, bias=False)  # softmax knows no bias
        last = nn.Linear(width // 2, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.transform = nn.Sequential(nn.Linear(width, width // 2), nn.LayerNorm(width // 2), nn.ReLU(), last)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(B, d)` of features `(B, d, H, W)` and the tokens of the image, bool `(B, H, W)`."""
        tokens = features.flatten(2).mT
        scores = self.weigh(tokens).squeeze(-1).masked_fill(~mask.flatten(1), -torch.inf)
        context = (scores.softmax(-1)[:, None] @ tokens).squeeze(1)
        return self.transform(context)


class FgdAdapter(MemoryAdapter):
    """FGD's projection, where widths differ, and for each level a relation block of the student and of the teacher."""

    always = False

    def __init__(self, width: int, their_width: int, levels: int, classes: int):
        super().__init__(width, their_width, levels, classes)
        self.student_relations = nn.ModuleList(RelationBlock(their_width) for _ in range(levels))
        self.teacher_relations = nn.ModuleList(RelationBlock(their_width) for _ in range(levels))

    def forward(self, levels: Sequence[ComparedLevel], targets: Targets) -> tuple[ComparedLevel, ...]:
        """The same levels, with the student's features in the teacher's width and the contexts of both."""
        carried = super().forward(levels, targets)
        blocks = zip(carried, self.student_relations, self.teacher_relations, strict=True)
        return tuple(
            level._replace(
                student_context=ours(level.student, level.mask), teacher_context=theirs(level.teacher, level.mask)
            )
            for level, ours, theirs in blocks
        )


class DefeatAdapter(MemoryAdapter):
    """DeFeat's adaptation layer: a convolution of 3 by 3 cells a level."""

    kernel = 3


class DetrdistillAdapter(MemoryAdapter):
    """DETRDistill's dense layer: one matrix a level."""


class ClockdistillAdapter(MemoryAdapter):
    """A matrix a level where the widths differ."""

    always = False


class VidtAdapter(MemoryAdapter):
    """Matrices for memory and queries where the widths differ."""

    reads_ground_truth = False
    always = False

    def __init__(self, width: int, their_width: int, levels: int, classes: int):
        super().__init__(width, their_width, levels, classes)
        self.queries = self._convolution(width, their_width) if width != their_width else nn.Identity()

    def carried_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries `(B, N, d)` in the teacher's width."""
        return self.queries(queries.mT[..., None]).squeeze(-1).mT
