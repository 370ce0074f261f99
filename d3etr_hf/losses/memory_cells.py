"""Cells of a memory's grid: which of them an object covers, and means over some of them."""

import torch

from d3etr_hf.outputs import Targets
from d3etr_hf.outputs.attention_maps import valid_sizes

# an overlap of less than this share of a cell's side is rounding
ROUNDING = 1e-4


def mean_over(values: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The mean of values `(B, H, W)` over these cells, bool `(B, H, W)`: `(B,)`, 0 where there are none."""
    kept = torch.where(cells, values, 0)
    return kept.sum(dim=(1, 2)) / cells.sum(dim=(1, 2)).clamp(min=1)


@torch.no_grad()
def covered_cells(targets: Targets, mask: torch.Tensor) -> torch.Tensor:
    """Which cells each object's box covers, at least in part; a box without area covers the cell of its centre.

    Args:
        targets: the ground truth, boxes in 0..1 of the unpadded image.
        mask: bool `(B, H, W)`, the cells of the image.

    Returns:
        bool `(B, T, H, W)`, false for objects that are not there.
    """
    (rows, columns), (height, width) = valid_sizes(mask), mask.shape[1:]
    centre_x, centre_y, box_width, box_height = targets.boxes.unbind(-1)
    along_y = _covered(centre_y, box_height, rows, height)
    along_x = _covered(centre_x, box_width, columns, width)
    return targets.present[..., None, None] & along_y[..., :, None] & along_x[..., None, :]


@torch.no_grad()
def foreground_weights(targets: Targets, mask: torch.Tensor) -> torch.Tensor:
    """float64 `(B, H, W)`: one over the number of cells of the smallest object over each cell, 0 on background."""
    covered = covered_cells(targets, mask).double()
    shares = covered / covered.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    none = torch.zeros_like(mask, dtype=shares.dtype)[:, None]  # in a batch without any object, too
    return torch.cat([none, shares], dim=1).amax(1)


def _covered(centre: torch.Tensor, size: torch.Tensor, cells: torch.Tensor, length: int) -> torch.Tensor:
    """Along one axis: bool `(B, T, length)` of centres and sizes `(B, T)` in 0..1 and int64 `(B,)` cells of images."""
    cells = cells[:, None]
    last_cell = cells - 1
    first = ((centre - size / 2) * cells + ROUNDING).floor().long().clamp(min=0).minimum(last_cell)
    last = ((centre + size / 2) * cells - ROUNDING).ceil().long().sub(1).minimum(last_cell).maximum(first)
    places = torch.arange(length, device=centre.device)
    return (places >= first[..., None]) & (places <= last[..., None])
