"""What every detector family hands to matching and losses: one type, whatever the model behind it."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class QueryGroupOutput(ModelOutput):
    """Predictions and attention maps of one query group, for L decoder layers.

    Attributes:
        logits: `(L, B, N, C)` class logits before the sigmoid.
        boxes: `(L, B, N, 4)` boxes, cxcywh in 0..1 of the unpadded image.
        log_self_attention: L tensors `(B, M, N, N)`, the natural logarithm of each self-attention map (a softmax over
            the last axis, before dropout), float32 or wider; None unless it was asked for.
        log_cross_attention: L tensors `(B, M, N, H*W)`, the same for the cross-attention over the memory; minus
            infinity where the memory is padding.
    """

    logits: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    log_self_attention: tuple[torch.Tensor, ...] | None = None
    log_cross_attention: tuple[torch.Tensor, ...] | None = None


@dataclass
class DetectorOutput(ModelOutput):
    """What one forward pass gives for all query groups.

    Attributes:
        groups: the model's own object queries first, then the extra groups in the order in which they were added.
        memory_mask: bool `(B, H, W)` on the memory's grid, true where a token belongs to the image, false on padding.
    """

    groups: tuple[QueryGroupOutput, ...] | None = None
    memory_mask: torch.Tensor | None = None
