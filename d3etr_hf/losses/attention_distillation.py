"""Self- and cross-attention distillation (section 3 of D3ETR; divergence and reduction: README)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.autograd.function import once_differentiable

from d3etr_hf.losses.grids import resample_map
from d3etr_hf.matching import MatchedPairs
from d3etr_hf.outputs import AttentionMap, SampledAttention

DIVERGENCES = ("kl", "mse")
DOT_PIECE = 2**19
# logarithm of no mass at all, finite so that nothing times it is nothing
NOWHERE = -1e30


def self_attention_distillation(
    teacher: Sequence[AttentionMap],
    student: Sequence[AttentionMap],
    pairs: MatchedPairs,
    images: float | torch.Tensor,
    divergence: str = "kl",
) -> torch.Tensor:
    """D(teacher's row || student's row) of matched queries, both axes of the maps permuted by the matching.

    Where only part of a side's queries is matched its map is restricted to the matched columns and each row is
    renormalised. Unequal heads are averaged first.

    Args:
        teacher, student: L maps `(B, M, N, N)` each, as `GroupOutput.self_attention`; no gradient reaches the
            teacher's.
        pairs: the matching, `(L, B, P)`.
        images: number of images that the mean goes over (of all processes, divided by their number).
        divergence: "kl" for KL(teacher || student), "mse" for the mean squared difference over keys.

    Returns:
        `(L,)`: per layer, the mean over pairs, heads and images.
    """
    terms = []
    for layer, (teacher_map, student_map) in enumerate(_same_heads(teacher, student)):
        order = None if pairs.identity else pairs.teacher[layer]
        if pairs.counted is not None:
            counted = pairs.counted[layer]
            teacher_map = _restricted(teacher_map, pairs.teacher[layer], counted)
            student_map = _restricted(student_map, pairs.student[layer], counted)
            keys = counted.sum(-1).clamp(min=1)[:, None, None]
            terms.append(_divergence(teacher_map, teacher_map.probability, student_map, keys, divergence))
            rows = teacher_map.log.shape[1] * counted.shape[-1]
            continue
        if order is not None and order.shape[-1] < teacher_map.log.shape[2]:
            teacher_map, order = _restricted(teacher_map, order), None
        # matched student queries ascend: all of them matched means in their own order
        if pairs.student.shape[-1] < student_map.log.shape[2]:
            student_map = _restricted(student_map, pairs.student[layer])
        target = teacher_map.probability if order is None else _block(teacher_map.probability, order)
        terms.append(_divergence(teacher_map, target, student_map, target.shape[-1], divergence))
        rows = target.shape[1] * target.shape[2]
    return torch.stack(terms) / (rows * images)


def cross_attention_distillation(
    teacher: Sequence[AttentionMap] | Sequence[SampledAttention],
    student: Sequence[AttentionMap] | Sequence[SampledAttention],
    pairs: MatchedPairs,
    teacher_memory_mask: torch.Tensor,
    student_memory_mask: torch.Tensor,
    images: float | torch.Tensor,
    divergence: str = "kl",
) -> torch.Tensor:
    """D(teacher's row || student's row) of matched queries over the memory; padded tokens carry no mass.

    Where the memories' grids differ the teacher's map is resampled to the student's, image by image; on one and the
    same grid, what the teacher sees where the student has padding is left out. Sampled attention
    is put on the student's grid first.

    Args:
        teacher, student: per layer a map `(B, M, N, H*W)` or sampled attention, as `GroupOutput.cross_attention`; no
            gradient reaches the teacher's.
        pairs: the matching, `(L, B, P)`.
        teacher_memory_mask, student_memory_mask: bool `(B, H, W)`, true on the image.
        images, divergence: as in `self_attention_distillation`.

    Returns:
        `(L,)`: per layer, the mean over pairs, heads and images.
    """
    if isinstance(teacher[0], SampledAttention):
        teacher_memory_mask = student_memory_mask
    dense_teacher, dense_student = _dense(teacher, student_memory_mask), _dense(student, student_memory_mask)
    same_grid = teacher_memory_mask.shape == student_memory_mask.shape
    keys = student_memory_mask.flatten(1).sum(-1)[:, None, None]
    on_image = student_memory_mask.flatten(1)[:, None, None]
    terms = []
    for layer, (teacher_map, student_map) in enumerate(_same_heads(dense_teacher, dense_student)):
        order = None if pairs.identity else pairs.teacher[layer]
        if not same_grid:
            teacher_map = resample_map(teacher_map.probability, teacher_memory_mask, student_memory_mask)
        if order is not None and (pairs.counted is not None or order.shape[-1] < teacher_map.log.shape[2]):
            teacher_map, order = AttentionMap(*(_rows(form, order) for form in teacher_map)), None
        if pairs.student.shape[-1] < student_map.log.shape[2]:
            student_map = AttentionMap(*(_rows(form, pairs.student[layer]) for form in student_map))
        if pairs.counted is not None:
            teacher_map, student_map = (_counted_rows(of, pairs.counted[layer]) for of in (teacher_map, student_map))
        target = teacher_map.probability if order is None else _rows(teacher_map.probability, order)
        if same_grid:
            # one grid may hold two ideas of what is padding: there the student has no mass, and its logarithm no bound
            target = target * on_image
        terms.append(_divergence(teacher_map, target, student_map, keys, divergence))
        rows = target.shape[1] * target.shape[2]
    return torch.stack(terms) / (rows * images)


def _dense(
    attention: Sequence[AttentionMap] | Sequence[SampledAttention], memory_mask: torch.Tensor
) -> list[AttentionMap]:
    """Maps as they are; sampled attention on the grid of the mask `(B, H, W)`."""
    return [layer.on_grid(memory_mask) if isinstance(layer, SampledAttention) else layer for layer in attention]


def _same_heads(
    teacher: Sequence[AttentionMap], student: Sequence[AttentionMap]
) -> Iterator[tuple[AttentionMap, AttentionMap]]:
    """Layer by layer, both maps as they are, or both averaged over heads where the head counts differ."""
    for teacher_map, student_map in zip(teacher, student, strict=True):
        if teacher_map.log.shape[1] != student_map.log.shape[1]:
            teacher_map, student_map = _mean_over_heads(teacher_map), _mean_over_heads(student_map)
        yield teacher_map, student_map


def _mean_over_heads(attention: AttentionMap) -> AttentionMap:
    """`(B, M, N, K)` to `(B, 1, N, K)`."""
    log = attention.log.logsumexp(1, keepdim=True) - math.log(attention.log.shape[1])
    return AttentionMap(log, attention.probability.mean(1, keepdim=True))


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, M, N, K)` and int64 `(B, P)` to `(B, M, P, K)`: whole rows are copied, not picked number by number."""
    batch, heads, queries, _ = values.shape
    first = torch.arange(0, batch * heads * queries, queries, device=index.device).view(batch, heads, 1)
    rows = (first + index[:, None]).flatten()
    return values.flatten(0, 2).index_select(0, rows).view(batch, heads, index.shape[1], -1)


def _block(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, M, N, N)` and int64 `(B, P)` to `(B, M, P, P)`: both axes in one pass."""
    flat = (index[:, :, None] * values.shape[-1] + index[:, None]).flatten(1)
    return (
        values.flatten(2).gather(2, flat[:, None].expand(-1, values.shape[1], -1)).unflatten(2, (index.shape[1], -1))
    )


def _restricted(attention: AttentionMap, index: torch.Tensor, counted: torch.Tensor | None = None) -> AttentionMap:
    """Rows and columns of a self-attention map by `(B, P)`, each row renormalised over the columns that are left.

    Args:
        counted: bool `(B, P)`, the columns that are left and the rows that have mass; None: all.
    """
    if counted is None:
        log = _block(attention.log, index).log_softmax(-1)
        return AttentionMap(log, log.exp())
    log = _block(attention.log, index).masked_fill(~counted[:, None, None], NOWHERE).log_softmax(-1)
    return _counted_rows(AttentionMap(log, log.exp()), counted)


def _counted_rows(attention: AttentionMap, counted: torch.Tensor) -> AttentionMap:
    """Without the mass of the rows, `(B, M, P, K)`, that are not counted, bool `(B, P)`."""
    return AttentionMap(attention.log, attention.probability * counted[:, None, :, None])


def _divergence(
    teacher: AttentionMap, target: torch.Tensor, student: AttentionMap, keys: int | torch.Tensor, divergence: str
) -> torch.Tensor:
    """Sum over images, heads and pairs.

    Args:
        teacher: in whatever order; its rows are those of `target`.
        target: the teacher's probabilities in the student's order.
        keys: how many keys a row has, padding left out; broadcastable to `(B, M, P)`.
    """
    if divergence == "kl":
        # sum of p (log p - log q). All rows weigh the same, so each sum is one dot product of whole maps, the
        # first whatever the order
        return _dot(teacher.probability, teacher.log) - _dot(target, student.log)
    if divergence == "mse":
        return ((target - student.probability).square().sum(-1) / keys).sum()
    raise ValueError(f"attention divergence {divergence!r}: choose one of {DIVERGENCES}")


def _dot(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum of `weights * values`, of one shape; no gradient reaches the weights."""
    return _Dot.apply(weights.to(values.dtype), values)


class _Dot(torch.autograd.Function):
    """A dot product in pieces: in one piece float32 loses a hundredth of the divergence of large maps.

    A divergence below about 1e-5 is rounding in float32, where entropy and cross-entropy cancel; its gradient is not.
    """

    @staticmethod
    def forward(ctx, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights)
        pieces = zip(weights.flatten().split(DOT_PIECE), values.flatten().split(DOT_PIECE), strict=True)
        return torch.stack([torch.dot(*piece) for piece in pieces]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (weights,) = ctx.saved_tensors
        return None, gradient * weights
