"""Dense families whose decoder does not ask Transformers' attention interface, but computes attention itself."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from d3etr_hf.models.dense_memory import DenseMemoryDetector, Memory
from d3etr_hf.models.group_attention import GroupAttention


class OwnAttention(nn.Module):
    """Stands before a stock attention class; while it has `groups` they attend apart, else that runs as it is.

    Attributes:
        is_self_attention: whether keys are the queries themselves, or else the memory.
        groups: how the queries are grouped.
    """

    is_self_attention: bool
    groups: GroupAttention | None = None
    scaling: float

    def attend_apart(self, query, key, value, mask: torch.Tensor | None, heads: int, dropout: float) -> torch.Tensor:
        """Attention of the groups, before its last projection.

        Args:
            query, key, value: projected, `(B, queries, heads * width)` and so on.
            mask: bool `(B, 1, 1, keys)` of the memory, true on the image; of no use to self-attention.

        Returns:
            `(B, queries, heads * width of values)`.
        """
        groups, dropout = self.groups, dropout if self.training else 0.0
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        if self.is_self_attention:
            attended = groups.attend_to_themselves(query, key, value, dropout, self.scaling)
        else:
            attended = groups.attend_to_memory(query, key, value, mask, dropout, self.scaling)
        return attended.transpose(1, 2).flatten(2)


class OwnAttentionDetector(DenseMemoryDetector):
    """A dense family from before Transformers' attention interface.

    Its decoder's attention modules become `group_attention`: the same modules with the same names in every checkpoint.
    Two groups with maps take 0.65 to 0.7 of what the decoder takes once per group, forward and backward on a CPU, and
    0.75 to 0.9 of one pass with a mask between groups; their logarithms are exact where a probability is zero.

    Attributes:
        group_attention: the family's attention class for several groups.
    """

    group_attention: ClassVar[type[OwnAttention]]

    @abstractmethod
    def attention_modules(self) -> Iterator[tuple[Any, bool]]:
        """The decoder's attention modules, and whether each is self-attention."""

    @property
    def backbone_module(self) -> nn.Module:
        return self.model.backbone.conv_encoder.model

    def prepare_attention(self) -> None:
        for module, is_self_attention in self.attention_modules():
            module.__class__ = self.group_attention
            module.is_self_attention = is_self_attention

    @contextmanager
    def attending(self, groups: GroupAttention) -> Iterator[None]:
        """Within this context the decoder's queries are these groups'."""
        modules = [module for module, _ in self.attention_modules()]
        for module in modules:
            module.groups = groups
        try:
            yield
        finally:
            for module in modules:
                module.groups = None

    def see(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        backbone = self.model.backbone
        features, mask = backbone.conv_encoder(pixel_values, pixel_mask)[-1]
        return features, mask, backbone.position_embedding(features, mask).to(pixel_values.dtype)

    def encoder_arguments(self, memory: Memory) -> dict[str, torch.Tensor]:
        """The mask as the stock model makes it, but without reading on the host whether there is any padding."""
        tokens = memory.tokens
        padding = ~memory.attention_mask.expand(-1, -1, tokens.shape[1], -1)
        mask = torch.zeros_like(padding, dtype=tokens.dtype).masked_fill_(padding, torch.finfo(tokens.dtype).min)
        return {"attention_mask": mask, "object_queries": memory.position}
