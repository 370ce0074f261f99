"""Bringing a teacher's cross-attention and memory to the grids of a student's memory when the two differ."""

import math
from collections.abc import Sequence

import torch

from d3etr_hf.outputs import AttentionMap, ComparedLevel, MemoryLevel, wide
from d3etr_hf.outputs.attention_maps import normalised_map, valid_sizes


def overlap_weights(source: torch.Tensor, target: torch.Tensor, source_size: int, target_size: int) -> torch.Tensor:
    """How the mass of source cells spreads over target cells along one axis that both divide evenly.

    Args:
        source, target: int64 `(B,)`, how many cells of the axis belong to the image.
        source_size, target_size: length of the axis with padding.

    Returns:
        float64 `(B, target_size, source_size)`; the column of a source cell inside the image sums to one.
    """

    def edges(cells: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.arange(size, device=cells.device, dtype=torch.float64) / cells[:, None]
        return start, (start + 1 / cells[:, None]).clamp(max=1.0)

    source_start, source_end = edges(source, source_size)
    target_start, target_end = edges(target, target_size)
    length = torch.minimum(target_end[:, :, None], source_end[:, None]) - torch.maximum(
        target_start[:, :, None], source_start[:, None]
    )
    return length.clamp(min=0) * source[:, None, None]


def resample_map(probability: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor) -> AttentionMap:
    """An attention map on another memory's grid: each token's mass goes where its area of the image goes.

    Works image by image on the unpadded area, for all images at once; the paper leaves this open.

    Args:
        probability: `(B, M, N, H*W)` on the source grid, zero on padding.
        source_mask: bool `(B, H, W)`; target_mask: bool `(B, H', W')`.

    Returns:
        The map `(B, M, N, H'*W')`, every row again a distribution over the image.
    """
    height, width = source_mask.shape[1:]
    (source_rows, source_columns), (rows, columns) = valid_sizes(source_mask), valid_sizes(target_mask)
    along_y = overlap_weights(source_rows, rows, height, target_mask.shape[1]).to(probability.dtype)
    along_x = overlap_weights(source_columns, columns, width, target_mask.shape[2]).to(probability.dtype)
    grid = probability.unflatten(-1, (height, width))
    with torch.autocast(grid.device.type, enabled=False):
        resampled = along_y[:, None, None] @ grid @ along_x.mT[:, None, None]
    return normalised_map(resampled.flatten(-2), target_mask)


def resample_features(features: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """A memory on another one's grid: each cell gets the mean of what its area of the image holds there.

    Works image by image on the unpadded area, for all images at once.

    Args:
        features: `(B, d, H, W)`, float32 or wider.
        source_mask: bool `(B, H, W)`; target_mask: bool `(B, H', W')`.

    Returns:
        `(B, d, H', W')`, zero on padding.
    """

    def means(source: torch.Tensor, target: torch.Tensor, axis: int) -> torch.Tensor:
        shares = overlap_weights(source, target, source_mask.shape[axis], target_mask.shape[axis])
        return (shares * (target.double() / source)[:, None, None]).to(features.dtype)[:, None]

    along_y, along_x = map(means, valid_sizes(source_mask), valid_sizes(target_mask), (1, 2))
    with torch.autocast(features.device.type, enabled=False):
        return along_y @ features @ along_x.mT


def nearest_level(cells: int, levels: Sequence[int]) -> int:
    """Which level, of a memory given by its levels' numbers of cells, is nearest by ratio; of two the first."""
    return min(range(len(levels)), key=lambda level: abs(math.log(levels[level] / cells)))


def compared_levels(student: Sequence[MemoryLevel], teacher: Sequence[MemoryLevel]) -> tuple[ComparedLevel, ...]:
    """Every level of a student's memory beside the teacher's level of the nearest size, on the student's grid."""
    sizes = [level.mask[0].numel() for level in teacher]
    found = []
    for features, mask in student:
        theirs = teacher[nearest_level(mask[0].numel(), sizes)]
        resampled = resample_features(wide(theirs.features.detach()), theirs.mask, mask)
        found.append(ComparedLevel(wide(features), resampled, mask))
    return tuple(found)
