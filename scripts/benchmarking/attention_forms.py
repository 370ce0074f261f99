"""Both forms of an attention map by a function of its own gradient, which the package's plain form is compared with.

It keeps one tensor for the backward pass where `log_softmax` and `softmax` keep one each, and passes over them once.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch.autograd.function import once_differentiable

from d3etr_hf.models import group_attention
from d3etr_hf.outputs import AttentionMap

Forms = Callable[[torch.Tensor], AttentionMap]


def custom_forms(scores: torch.Tensor) -> AttentionMap:
    """As `group_attention.both_forms`; the scores `(B, M, queries, keys)` are overwritten."""
    return AttentionMap(*_OneSavedTensor.apply(scores))


FORMS: dict[str, Forms] = {"step_plain_forms": group_attention.both_forms, "step_custom_forms": custom_forms}


def with_forms(step: Callable[[], None], forms: Forms) -> Callable[[], None]:
    """The step with these forms in place of the package's."""

    def patched() -> None:
        with patch.object(group_attention, "both_forms", forms):
            step()

    return patched


def why_not_compiled(forms: Forms) -> str | None:
    """What keeps `torch.compile` from taking attention with these forms, and its gradient, as one graph; or None."""
    torch.compiler.reset()
    query, key, value = (torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(3))
    attend = torch.compile(group_attention.attend, fullgraph=True, backend="aot_eager")
    try:
        with patch.object(group_attention, "both_forms", forms):
            output, attention = attend(query, key, value, None, 0.0, 0.25, True)
            (output.sum() + attention.log.sum() + attention.probability.square().sum()).backward()
    except Exception as error:  # of whatever kind the compiler raises
        return str(error).strip().partition("\n")[0]
    return None


class _OneSavedTensor(torch.autograd.Function):
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
