"""Bringing a teacher's cross-attention to a student's memory grid when the two differ."""

import torch

from d3etr_hf.outputs.attention_maps import AttentionMap, normalised_map, valid_sizes


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
