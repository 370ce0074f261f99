"""An encoder's memory as maps, level by level, and a student's beside its teacher's."""

from typing import NamedTuple

import torch


class MemoryLevel(NamedTuple):
    """One level of what a decoder reads.

    Attributes:
        features: `(B, d, H, W)`.
        mask: bool `(B, H, W)`, true where a token belongs to the image; it fills whole rows and columns from the top
            left.
    """

    features: torch.Tensor
    mask: torch.Tensor

    def detach(self) -> "MemoryLevel":
        """The same values without gradient."""
        return MemoryLevel(self.features.detach(), self.mask)


class ComparedLevel(NamedTuple):
    """A level of the student's memory and what it shall become, float32 or wider.

    Attributes:
        student: `(B, d, H, W)`; once an adapter has carried it, in the teacher's width.
        teacher: `(B, d_t, H, W)`, on the student's grid, without gradient.
        mask: bool `(B, H, W)`, of the student's.
        student_context, teacher_context: `(B, d_t)`, what a relation block adds to every token of each; None without.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    mask: torch.Tensor
    student_context: torch.Tensor | None = None
    teacher_context: torch.Tensor | None = None
