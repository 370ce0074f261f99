"""Attention of queries to each other and to the memory, dense or sampled, as losses compare it."""

from typing import NamedTuple

import torch

# share of sampled attention's weight that its map on a grid spreads over the whole image
EVENLY = 0.01


class AttentionMap(NamedTuple):
    """One layer's attention map before dropout, in both forms that divergences read; computing attention gives both.

    Attributes:
        log: `(B, M, N, keys)`, the natural logarithm of the map, float32 or wider. Finite everywhere: very
            low where the key is padding (-1e30 or less), so that zero times it is zero.
        probability: `(B, M, N, keys)`, its exponential: every row sums to one, padding is exactly zero.
    """

    log: torch.Tensor
    probability: torch.Tensor

    def detach(self) -> "AttentionMap":
        """The same values without gradient."""
        return AttentionMap(self.log.detach(), self.probability.detach())


class SampledAttention(NamedTuple):
    """One layer's attention to places between the cells of the memory (deformable attention), before dropout.

    Attributes:
        places: `(B, M, N, P, 2)`, x and y in 0..1 of the unpadded image, over all levels; may lie outside.
        weights: `(B, M, N, P)`, float32 or wider; every row sums to one.
    """

    places: torch.Tensor
    weights: torch.Tensor

    def detach(self) -> "SampledAttention":
        """The same values without gradient."""
        return SampledAttention(self.places.detach(), self.weights.detach())

    def on_grid(self, memory_mask: torch.Tensor) -> AttentionMap:
        """The dense map that spreads each weight bilinearly over the four cells around its place.

        What lies outside the image is lost; a hundredth of a query's weight is spread evenly over the image, and each
        row is made to sum to one again. Without that hundredth a dense teacher's KL divergence from a sampled student
        would be the teacher's mass on cells that no place is near, times the logarithm of the smallest number.

        Args:
            memory_mask: bool `(B, H, W)`, true on the image; it fills whole rows and columns from the top left.

        Returns:
            The map `(B, M, N, H*W)`.
        """
        batch, height, width = memory_mask.shape
        rows, columns = valid_sizes(memory_mask)
        extent = torch.stack([columns, rows], dim=-1).to(self.places.dtype)[:, None, None, None]
        corner = self.places * extent - 0.5  # in cells, from the centre of the first
        low = corner.floor()
        grid = (EVENLY / (rows * columns).to(self.weights.dtype))[:, None, None, None]
        grid = grid.expand(*self.weights.shape[:3], height * width)
        for step in ((0, 0), (0, 1), (1, 0), (1, 1)):
            cell = torch.stack([low[..., 0] + step[0], low[..., 1] + step[1]], dim=-1)
            share = (1 - (corner - cell).abs()).prod(-1) * self.weights
            inside = ((cell >= 0) & (cell < extent)).all(-1)
            x, y = cell.clamp(min=0).minimum(extent - 1).long().unbind(-1)
            grid = grid.scatter_add(-1, y * width + x, torch.where(inside, share, 0))
        return normalised_map(grid, memory_mask)


def normalised_map(mass: torch.Tensor, memory_mask: torch.Tensor) -> AttentionMap:
    """Mass on a memory's grid `(B, M, N, H*W)` as distributions over the cells of the image; bool mask `(B, H, W)`."""
    numbers = torch.finfo(mass.dtype)
    padding = ~memory_mask.flatten(1)[:, None, None]
    mass = mass.clamp(min=numbers.tiny).masked_fill(padding, 0.0)
    probability = mass / mass.sum(-1, keepdim=True)
    # masked rather than clamped from below: the derivative of the logarithm at zero would make its gradient NaN
    log = probability.clamp(min=numbers.tiny).log().masked_fill(padding, numbers.min)
    return AttentionMap(log, probability)


def valid_sizes(memory_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of each memory that belong to the image, int64 `(B,)` each, from its mask `(B, H, W)`."""
    return memory_mask.any(2).sum(1), memory_mask.any(1).sum(1)
