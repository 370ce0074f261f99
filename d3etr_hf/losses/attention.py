"""Self- and cross-attention distillation (section 3 of D3ETR; divergence and reduction: README)."""

import math
from collections.abc import Sequence

import torch

from ..matching import MatchedPairs
from .grids import resample_log_map

DIVERGENCES = ("kl", "mse")


def self_attention_distillation(
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    pairs: MatchedPairs,
    images: float | torch.Tensor,
    divergence: str = "kl",
) -> torch.Tensor:
    """D(teacher's row || student's row) of matched queries, both axes of the maps permuted by the matching.

    Where only part of a side's queries is matched its map is restricted to the matched columns and each row is
    renormalised. Unequal heads are averaged first.

    Args:
        teacher, student: L log maps `(B, M, N, N)` each, as `QueryGroupOutput.log_self_attention`.
        pairs: the matching, `(L, B, P)`.
        images: number of images that the mean goes over (of all processes, divided by their number).
        divergence: "kl" for KL(teacher || student), "mse" for the mean squared difference over keys.

    Returns:
        `(L,)`: per layer, the mean over pairs, heads and images.
    """
    terms = []
    for layer, (teacher_map, student_map) in enumerate(_same_heads(teacher, student)):
        teacher_map = _restrict(teacher_map, pairs.teacher[layer], skip=pairs.identity)
        # matched student queries ascend: all of them matched means in their own order, so nothing is to be gathered
        complete = pairs.student.shape[-1] == student_map.shape[2]
        student_map = _restrict(student_map, pairs.student[layer], skip=complete)
        terms.append(_divergence(teacher_map, student_map, None, divergence) / images)
    return torch.stack(terms)


def cross_attention_distillation(
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    pairs: MatchedPairs,
    teacher_memory_mask: torch.Tensor,
    student_memory_mask: torch.Tensor,
    images: float | torch.Tensor,
    divergence: str = "kl",
) -> torch.Tensor:
    """D(teacher's row || student's row) of matched queries over the memory; padded tokens are left out of the sum.

    Where the memories' grids differ the teacher's map is resampled to the student's, image by image.

    Args:
        teacher, student: L log maps `(B, M, N, H*W)` each, as `QueryGroupOutput.log_cross_attention`.
        pairs: the matching, `(L, B, P)`.
        teacher_memory_mask, student_memory_mask: bool `(B, H, W)`, true on the image.
        images, divergence: as in `self_attention_distillation`.

    Returns:
        `(L,)`: per layer, the mean over pairs, heads and images.
    """
    same_grid = teacher_memory_mask.shape == student_memory_mask.shape
    terms = []
    for layer, (teacher_map, student_map) in enumerate(_same_heads(teacher, student)):
        if not pairs.identity:
            teacher_map = _rows(teacher_map, pairs.teacher[layer])
        if not same_grid:
            teacher_map = resample_log_map(teacher_map, teacher_memory_mask, student_memory_mask)
        if pairs.student.shape[-1] != student_map.shape[2]:
            student_map = _rows(student_map, pairs.student[layer])
        valid = student_memory_mask.flatten(1)[:, None, None]
        terms.append(_divergence(teacher_map, student_map, valid, divergence) / images)
    return torch.stack(terms)


def _same_heads(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]):
    """Layer by layer, both maps as they are, or both averaged over heads where the head counts differ."""
    for teacher_map, student_map in zip(teacher, student, strict=True):
        if teacher_map.shape[1] != student_map.shape[1]:
            teacher_map, student_map = _mean_over_heads(teacher_map), _mean_over_heads(student_map)
        yield teacher_map, student_map


def _mean_over_heads(log_map: torch.Tensor) -> torch.Tensor:
    """`(B, M, N, K)` to `(B, 1, N, K)`; finite on padding, where the gradient of log 0 would be NaN."""
    finite = log_map.clamp(min=torch.finfo(log_map.dtype).min)
    return finite.logsumexp(1, keepdim=True) - math.log(log_map.shape[1])


def _rows(log_map: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, M, N, K)` and int64 `(B, P)` to `(B, M, P, K)`."""
    return log_map.take_along_dim(index[:, None, :, None], dim=2)


def _restrict(log_map: torch.Tensor, index: torch.Tensor, skip: bool) -> torch.Tensor:
    """Rows and columns of a self-attention map by `(B, P)`, renormalised if columns were dropped."""
    if skip:
        return log_map
    restricted = _rows(log_map, index).take_along_dim(index[:, None, None, :], dim=3)
    return restricted if index.shape[-1] == log_map.shape[-1] else restricted.log_softmax(-1)


def _divergence(
    teacher: torch.Tensor, student: torch.Tensor, valid: torch.Tensor | None, divergence: str
) -> torch.Tensor:
    """Sum over images of the mean over pairs and heads; `valid` bool, broadcastable to the maps, marks the keys."""
    if divergence == "kl":
        difference = teacher - student
        if valid is not None:
            # -inf - -inf on padding is NaN, and so would its gradient be: cut it out before it is multiplied
            difference = difference.masked_fill(~valid, 0.0)
        per_row = (teacher.exp() * difference).sum(-1)
    elif divergence == "mse":
        keys = teacher.shape[-1] if valid is None else valid.sum(-1)
        per_row = (teacher.exp() - student.exp()).square().sum(-1) / keys
    else:
        raise ValueError(f"attention divergence {divergence!r}: choose one of {DIVERGENCES}")
    return per_row.mean(dim=(1, 2)).sum()
