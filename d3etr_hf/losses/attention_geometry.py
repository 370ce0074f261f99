"""Cross-attention compared by where it looks: two ways for sampled attention beside the common grid."""

from collections.abc import Callable, Sequence

import torch

from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.matching import MatchedPairs
from d3etr_hf.outputs import AttentionMap, SampledAttention
from d3etr_hf.outputs.attention_maps import valid_sizes

Attention = AttentionMap | SampledAttention


def moment_distillation(
    teacher: Sequence[Attention],
    student: Sequence[Attention],
    pairs: MatchedPairs,
    teacher_memory_mask: torch.Tensor,
    student_memory_mask: torch.Tensor,
    images: float | torch.Tensor,
) -> torch.Tensor:
    """L1 between the centres of attention, and between its spreads along x and y, of matched queries.

    Dense and sampled attention may teach each other; heads that differ in number are taken together.

    Args:
        teacher, student: per layer a map `(B, M, N, H*W)` or sampled attention; no gradient reaches the teacher's.
        pairs: the matching, `(L, B, P)`.
        teacher_memory_mask, student_memory_mask: bool `(B, H, W)`, true on the image.
        images: number of images that the mean goes over (of all processes, divided by their number).

    Returns:
        `(L,)`: per layer, the mean over pairs, heads and images; shares of the image's sides.
    """

    def compare(theirs: Attention, ours: Attention) -> tuple[torch.Tensor, torch.Tensor]:
        joined = _heads(theirs) != _heads(ours)
        return moments(theirs, teacher_memory_mask, joined), moments(ours, student_memory_mask, joined)

    def distance(target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return (target - found).abs().sum(-1)

    return _over_layers(teacher, student, pairs, images, compare, distance)


def place_distillation(
    teacher: Sequence[Attention],
    student: Sequence[Attention],
    pairs: MatchedPairs,
    images: float | torch.Tensor,
) -> torch.Tensor:
    """KL(teacher's weights || student's) plus the L1 distance of their places, weighed by the teacher's weights.

    For models of equal heads, levels and points, whose k-th place then is the same question to both.

    Args, Returns: as `moment_distillation`.

    Raises:
        IncompatibleTeacherError: heads, or places of a query, differ in number, or one of the two attends to the whole
            memory.
    """

    def flat(theirs: Attention, ours: Attention) -> tuple[torch.Tensor, ...]:
        if not (isinstance(theirs, SampledAttention) and isinstance(ours, SampledAttention)):
            raise IncompatibleTeacherError(
                "cross_attention_space='places': attention to the whole memory has no places to compare, and one of "
                "the two models, or both, attend to it; set it to grid or moments"
            )
        if _sizes(theirs) != _sizes(ours):
            raise IncompatibleTeacherError(
                f"cross_attention_space='places': the teacher samples (heads, places) {_sizes(theirs)}, the student "
                f"{_sizes(ours)}, and they are compared place by place only where these agree; set it to grid or "
                "moments"
            )
        parts = [torch.cat([part.places, part.weights[..., None]], dim=-1) for part in (theirs, ours)]
        return tuple(part.flatten(-2) for part in parts)

    def distance(target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        tiny = torch.finfo(found.dtype).tiny
        target, found = target.unflatten(-1, (-1, 3)), found.unflatten(-1, (-1, 3))
        weights, ours = target[..., 2], found[..., 2].clamp(min=tiny)
        divergence = weights * (weights.clamp(min=tiny).log() - ours.log())
        return (divergence + weights * (target[..., :2] - found[..., :2]).abs().sum(-1)).sum(-1)

    return _over_layers(teacher, student, pairs, images, flat, distance)


def space_of(teacher: Sequence[Attention], student: Sequence[Attention]) -> str:
    """Where attention is compared by default: "grid" for two dense maps, "places" for like samplers, else "moments".

    Measured with D-FINE on synthetic shapes (model_cards/families): places brought most, moments about half of that,
    the grid next to nothing.
    """
    theirs, ours = teacher[0], student[0]
    if isinstance(theirs, AttentionMap) and isinstance(ours, AttentionMap):
        return "grid"
    if isinstance(theirs, SampledAttention) and isinstance(ours, SampledAttention) and _sizes(theirs) == _sizes(ours):
        return "places"
    return "moments"


def moments(attention: Attention, memory_mask: torch.Tensor, join_heads: bool = False) -> torch.Tensor:
    """Where attention looks: its mean and its standard deviation along x and y, in shares of the image.

    Args:
        memory_mask: bool `(B, H, W)`, of a dense map's memory.
        join_heads: take all heads as one.

    Returns:
        `(B, M, N, 4)`, or `(B, 1, N, 4)`: mean x and y, deviation in x and y.
    """
    if isinstance(attention, SampledAttention):
        weights, places = attention.weights, attention.places
        centre = (weights[..., None] * places).sum(-2)
        square = (weights[..., None] * places.square()).sum(-2)
    else:
        cells = _cell_centres(memory_mask).to(attention.probability.dtype)
        centre = attention.probability @ cells[:, None]
        square = attention.probability @ cells.square()[:, None]
    if join_heads:
        centre, square = centre.mean(1, keepdim=True), square.mean(1, keepdim=True)
    # a hair's breadth, so that the root has a gradient where all weight is on one place
    deviation = (square - centre.square()).clamp(min=1e-8).sqrt()
    return torch.cat([centre, deviation], dim=-1)


def _cell_centres(memory_mask: torch.Tensor) -> torch.Tensor:
    """`(B, H*W, 2)`: x and y of each token's centre in shares of the unpadded image."""
    rows, columns = valid_sizes(memory_mask)
    height, width = memory_mask.shape[1:]
    y, x = (torch.arange(size, device=memory_mask.device) + 0.5 for size in (height, width))
    across = (x / columns[:, None])[:, None].expand(-1, height, -1)
    down = (y / rows[:, None])[:, :, None].expand(-1, -1, width)
    return torch.stack([across, down], dim=-1).flatten(1, 2)


def _heads(attention: Attention) -> int:
    return attention[-1].shape[1]


def _sizes(attention: SampledAttention) -> tuple[int, int]:
    """Numbers of heads, and of places of a query."""
    return attention.weights.shape[1], attention.weights.shape[3]


def _over_layers(
    teacher: Sequence, student: Sequence, pairs: MatchedPairs, images, values_of: Callable, distance: Callable
) -> torch.Tensor:
    """Per layer the mean over pairs, heads and images of a distance between what `values_of` takes of both."""
    terms = []
    for layer, (theirs, ours) in enumerate(zip(teacher, student, strict=True)):
        target, found = values_of(theirs.detach(), ours)
        target = target.take_along_dim(pairs.teacher[layer][:, None, :, None], dim=2)
        found = found.take_along_dim(pairs.student[layer][:, None, :, None], dim=2)
        each = distance(target, found)
        if pairs.counted is not None:
            each = each * pairs.counted[layer][:, None]
        terms.append(each.sum() / (each.shape[1] * each.shape[2]))
    return torch.stack(terms) / images
