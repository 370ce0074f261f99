"""Attention for several query groups, with maps on demand, through Transformers' attention interface.

The decoder's attention modules call the function registered here instead of scaled-dot-product attention. Without
`groups` it hands over to whatever the model's own configuration names: a stock forward pass is untouched.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from d3etr_hf.outputs import AttentionMap

GROUP_ATTENTION = "d3etr_query_groups"
# taken off the scores of padding: no weight is left there, and the logarithm stays finite
PADDING = 1e30


@dataclass
class GroupAttention:
    """How the queries of one forward pass are grouped, and the maps that it collects, layer by layer.

    Attributes:
        sizes: number of queries by the group's name, in their order along the query axis.
        sees: by the group's name, which groups it attends to in self-attention; itself alone where it is not named.
        masks: by the group's name, bool broadcastable to `(B, M, N, queries that it sees)`, true where it may look;
            everywhere if not named.
        alike: groups of one size, one after the other, that Group DETR trains: attended as if each were a batch of its
            own. Of them the first alone has a map.
        self_attention, cross_attention: whether to record these maps (unrecorded attention runs fused); those of a
            group that sees others are not recorded.
        self_maps, cross_maps: per layer an `AttentionMap` by the group's name.
        open: true during the forward pass; activation checkpointing runs layers again in the backward pass.
    """

    sizes: dict[str, int]
    self_attention: bool
    cross_attention: bool
    sees: dict[str, tuple[str, ...]] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    alike: tuple[str, ...] = ()
    self_maps: list[dict[str, AttentionMap]] = field(default_factory=list)
    cross_maps: list[dict[str, AttentionMap]] = field(default_factory=list)
    open: bool = True

    def split(self, tensor: torch.Tensor, dim: int) -> dict[str, torch.Tensor]:
        """The parts of a tensor along its query axis, by the group's name."""
        return dict(zip(self.sizes, tensor.split(list(self.sizes.values()), dim=dim), strict=True))

    def attend_to_themselves(self, query, key, value, dropout: float, scaling: float) -> torch.Tensor:
        """Self-attention, group by group: `(B, M, sum of N, ·)` each and in return; maps are recorded."""
        queries, keys, values = (self.split(tensor, 2) for tensor in (query, key, value))
        attended: dict[str, torch.Tensor] = {}
        maps: dict[str, AttentionMap | None] = dict.fromkeys(self.sizes)
        if together := self.alike[1:] if self.self_attention else self.alike:
            q, k, v = (torch.cat([of[name] for name in together]) for of in (queries, keys, values))
            found, _ = attend(q, k, v, None, dropout, scaling, False)
            attended |= zip(together, found.chunk(len(together)), strict=True)
        for name in [name for name in self.sizes if name not in attended]:
            seen = self.sees.get(name, (name,))
            with_map = self.self_attention and seen == (name,)
            k, v = (torch.cat([of[other] for other in seen], dim=2) for of in (keys, values))
            attended[name], maps[name] = attend(queries[name], k, v, self.masks.get(name), dropout, scaling, with_map)
        if self.self_attention and self.open:
            self.self_maps.append(maps)
        return torch.cat([attended[name] for name in self.sizes], dim=2)

    def attend_to_memory(self, query, key, value, mask, dropout: float, scaling: float) -> torch.Tensor:
        """Cross-attention of all groups at once, so that one projection of the memory serves them; maps are recorded.

        Arguments and return value as of `attend`.
        """
        if self.cross_attention and mask is not None:
            mask = mask[:, :, :1]  # padding is the same for every query
        output, whole = attend(query, key, value, mask, dropout, scaling, self.cross_attention)
        if whole is not None and self.open:
            forms = [self.split(form, 2) for form in whole]
            self.cross_maps.append({name: AttentionMap(*(form[name] for form in forms)) for name in self.sizes})
        return output

    def maps_of(self, group: str) -> dict[str, Any]:
        """The maps of one group as fields of its `GroupOutput`."""
        return {
            "self_attention": tuple(layer[group] for layer in self.self_maps) or None,
            "cross_attention": tuple(layer[group] for layer in self.cross_maps) or None,
        }


class _Stock(NamedTuple):
    """What an attention module did before it was routed here."""

    config: Any
    eager: Callable
    is_self_attention: bool


def route_attention(config, self_attention: Iterable[Any], cross_attention: Iterable[Any], eager: Callable) -> None:
    """Let these attention modules of a decoder call the function below.

    Args:
        config: the model's own, which says what a stock forward pass runs on.
        eager: the family's eager attention function.
    """
    for modules, is_self_attention in ((self_attention, True), (cross_attention, False)):
        for module in modules:
            module.stock = _Stock(config, eager, is_self_attention)
            module.config = with_attention(config, GROUP_ATTENTION)


def with_attention(config, name: str):
    """A copy of a configuration that asks for this attention implementation."""
    config = copy.copy(config)
    config._attn_implementation_internal = name  # the property would set the backbone's shared configuration as well
    return config


def implementation_of(config) -> str:
    """The attention implementation that a configuration asks for."""
    return config._attn_implementation


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float,
    with_map: bool,
) -> tuple[torch.Tensor, AttentionMap | None]:
    """Scaled-dot-product attention, and its map before dropout if asked for.

    Args:
        query, key, value: `(B, M, queries, width)`, `(B, M, keys, width)`, `(B, M, keys, width of values)`.
        mask: bool, broadcastable to `(B, M, queries, keys)`, true where a query may look; None for everywhere.
        dropout: probability with which an attention weight is zeroed.

    Returns:
        The attended values `(B, M, queries, width of values)` and the map `(B, M, queries, keys)`, or None.
    """
    if not with_map:
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        return attended, None
    # scaling the queries is scaling the scores, over fewer numbers
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        # adding to the scores is much faster than filling them
        padding = ~mask
        scores = scores + torch.zeros_like(padding, dtype=scores.dtype).masked_fill_(padding, -PADDING)
    attention = both_forms(scores)
    weights = nn.functional.dropout(attention.probability, p=dropout) if dropout else attention.probability
    return torch.matmul(weights.to(value.dtype), value), attention


def both_forms(scores: torch.Tensor) -> AttentionMap:
    """The map of attention scores `(B, M, queries, keys)`, float32 or wider: their softmax and its logarithm."""
    return AttentionMap(scores.log_softmax(-1), scores.softmax(-1))


def query_group_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    groups: GroupAttention | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of a decoder whose queries are several groups one after the other.

    In self-attention each group attends to itself alone: the groups are attended one by one, so no mask can leak
    (a boolean group mask does, under eager attention). Arguments and return value follow Transformers' attention
    interface; `attention_mask` is boolean or None when `groups` is given.
    """
    stock: _Stock = module.stock
    if groups is None:
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation_of(stock.config), stock.eager)
        return interface(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if stock.is_self_attention:
        output = groups.attend_to_themselves(query, key, value, dropout, scaling)
    else:
        output = groups.attend_to_memory(query, key, value, attention_mask, dropout, scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(GROUP_ATTENTION, query_group_attention)
