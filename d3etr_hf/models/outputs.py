"""What every detector family hands to matching and losses: one type, whatever the model behind it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


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


@dataclass
class QueryGroupOutput(ModelOutput):
    """Predictions and attention maps of one query group, for L decoder layers.

    Attributes:
        logits: `(L, B, N, C)` class logits before the sigmoid.
        boxes: `(L, B, N, 4)` boxes, cxcywh in 0..1 of the unpadded image.
        self_attention: L maps over the N queries of the group itself; None unless they were asked for.
        cross_attention: L maps over the H*W tokens of the memory; None unless they were asked for.
    """

    logits: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    self_attention: tuple[AttentionMap, ...] | None = None
    cross_attention: tuple[AttentionMap, ...] | None = None


@dataclass
class DetectorOutput(ModelOutput):
    """What one forward pass gives for all query groups.

    Attributes:
        groups: the model's own object queries first, then the extra groups in the order in which they were added.
        memory_mask: bool `(B, H, W)` on the memory's grid, true where a token belongs to the image, false on padding.
    """

    groups: tuple[QueryGroupOutput, ...] | None = None
    memory_mask: torch.Tensor | None = None
