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


class DecodedInstances(NamedTuple):
    """What ICD's decoder finds of K instances of each image, some of which are fakes, in M heads; d = d_t / M.

    Attributes:
        attention: `(B, M, K, S)`, of each to the teacher's S tokens of all levels, 0 on padding; without gradient.
        teacher_values: `(B, M, S, d)`, normed over d, without gradient.
        student_values: `(B, M, S, d)`, normed over d.
        confidence: `(B, K)`, logit of being real.
        edges: `(B, K, 4)`, predicted distances of left, top, right and bottom edge from the described place, as shares
            of the image.
        target_edges: `(B, K, 4)`, the true ones.
        real: bool `(B, K)`, objects of the image.
        there: bool `(B, K)`, objects and fakes; else the place only fills up the batch.
    """

    attention: torch.Tensor
    teacher_values: torch.Tensor
    student_values: torch.Tensor
    confidence: torch.Tensor
    edges: torch.Tensor
    target_edges: torch.Tensor
    real: torch.Tensor
    there: torch.Tensor
