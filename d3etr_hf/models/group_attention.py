"""Attention for several query groups, with maps on demand, through Transformers' attention interface.

The decoder's attention modules call the function registered here instead of scaled-dot-product attention. Without
`query_group_sizes` it hands over to whatever the model's own configuration names: a stock forward pass is untouched.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrDecoderSelfAttention,
    eager_attention_forward,
)

from d3etr_hf.models.outputs import AttentionMap

QUERY_GROUP_ATTENTION = "d3etr_query_groups"
# taken off the scores of padding: no weight is left there, and the logarithm stays finite
PADDING = 1e30


@dataclass
class AttentionRecorder:
    """Collects, layer by layer and group by group, the attention maps of one forward pass.

    Attributes:
        self_attention, cross_attention: whether to record these maps (unrecorded attention runs fused).
        self_maps, cross_maps: per layer, per group, an `AttentionMap`.
        open: true during the forward pass; activation checkpointing runs layers again in the backward pass.
    """

    self_attention: bool
    cross_attention: bool
    self_maps: list[list[AttentionMap]] = field(default_factory=list)
    cross_maps: list[list[AttentionMap]] = field(default_factory=list)
    open: bool = True


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
        scores.add_(torch.zeros_like(padding, dtype=scores.dtype).masked_fill_(padding, -PADDING))
    attention = both_forms(scores)
    weights = nn.functional.dropout(attention.probability, p=dropout) if dropout else attention.probability
    return torch.matmul(weights.to(value.dtype), value), attention


def both_forms(scores: torch.Tensor) -> AttentionMap:
    """The map of attention scores `(B, M, queries, keys)`, float32 or wider: their softmax and its logarithm.

    The scores are overwritten by the logarithm; they must not be a leaf that wants a gradient.
    """
    return AttentionMap(*_BothForms.apply(scores))


class _BothForms(torch.autograd.Function):
    """Log-softmax and softmax of the same scores over the last axis.

    log_softmax followed by exp would keep both results for the backward pass, and pass over them once more there. Here
    the logarithm is free as soon as the losses have read it.
    """

    @staticmethod
    def forward(ctx, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Not exp of log_softmax, which is ten times slower where it comes to zero. The largest probability is
        # exp(largest score) / sum, so its logarithm tells the sum's without another pass over all exponentials.
        probability = scores.softmax(-1)
        log_sum = scores.amax(-1, keepdim=True).sub_(probability.amax(-1, keepdim=True).log_())
        log = scores.sub_(log_sum)
        ctx.mark_dirty(log)
        ctx.save_for_backward(probability)
        ctx.set_materialize_grads(False)
        return log, probability

    @staticmethod
    @once_differentiable
    def backward(ctx, log_gradient: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
        (probability,) = ctx.saved_tensors
        if gradient is None:
            return log_gradient if log_gradient is None else _log_softmax_gradient(log_gradient, probability)
        # of softmax: p (g - sum of g p)
        scores_gradient = gradient * probability
        total = scores_gradient.sum(-1, keepdim=True)
        if log_gradient is not None:
            total += log_gradient.sum(-1, keepdim=True)
            scores_gradient += log_gradient
        return scores_gradient.addcmul_(probability, total, value=-1)


def _log_softmax_gradient(gradient: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(gradient, probability, gradient.sum(-1, keepdim=True), value=-1)


def query_group_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    query_group_sizes: list[int] | None = None,
    recorder: AttentionRecorder | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of a decoder whose queries are several groups one after the other.

    In self-attention each group attends to itself alone: the groups are attended one by one, so no mask can leak
    (a boolean group mask does, under eager attention). Cross-attention sees all queries at once, so the projections
    of the memory serve every group. Arguments and return value follow Transformers' attention interface;
    `attention_mask` is boolean or None when `query_group_sizes` is given.
    """
    if query_group_sizes is None:
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.stock_config._attn_implementation, eager_attention_forward
        )
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if isinstance(module, ConditionalDetrDecoderSelfAttention):
        parts = zip(*(tensor.split(query_group_sizes, dim=2) for tensor in (query, key, value)), strict=True)
        attended = [attend(*part, None, dropout, scaling, recorder.self_attention) for part in parts]
        if recorder.self_attention and recorder.open:
            recorder.self_maps.append([attention_map for _, attention_map in attended])
        output = torch.cat([part for part, _ in attended], dim=2)
    else:
        if recorder.cross_attention and attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]  # padding is the same for every query
        output, whole = attend(query, key, value, attention_mask, dropout, scaling, recorder.cross_attention)
        if recorder.cross_attention and recorder.open:
            parts = zip(*(form.split(query_group_sizes, dim=2) for form in whole), strict=True)
            recorder.cross_maps.append([AttentionMap(*part) for part in parts])
    return output.transpose(1, 2), None


AttentionInterface.register(QUERY_GROUP_ATTENTION, query_group_attention)
