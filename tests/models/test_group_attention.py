"""The decoder's attention function: the map in both forms, and nothing on padding."""

import pytest
import torch

from d3etr_hf.models.group_attention import attend, both_forms


@pytest.mark.parametrize("read", ["both", "log", "probability"])
def test_gradient_of_both_forms(read):
    """Against the formulas with sums of exponentials, whichever of the two forms the losses read."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 4, 7, generator=generator, dtype=torch.float64)
    scores[1, ..., 5:] -= 1e30  # padding
    weights = torch.randn(2, *scores.shape, generator=generator, dtype=torch.float64)
    weights[0, 1, ..., 5:] = 0  # losses leave padding out
    if read == "log":
        weights[1] = 0
    gradients = []

    def by_hand(scores):
        exponentials = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        total = exponentials.sum(-1, keepdim=True)
        return scores - scores.detach().amax(-1, keepdim=True) - total.log(), exponentials / total

    for forms in (both_forms, by_hand):
        leaf = scores.clone().requires_grad_()
        log, probability = forms(leaf * 1)
        loss = 0
        if read != "probability":
            loss = loss + (weights[0] * log).sum()
        if read != "log":
            loss = loss + (weights[1] * probability**2).sum()
        loss.backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_padding_gets_nothing_in_any_precision(dtype):
    """The forms are float32 at least: a half-precision score could not hold what is taken off padding."""
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    attended, attention = attend(query, key, value, mask, 0.0, 0.3, with_map=True)
    fused, _ = attend(query, key, value, mask, 0.0, 0.3, with_map=False)
    assert attended.dtype == dtype and attention.log.dtype == attention.probability.dtype == torch.float32
    assert attention.log.isfinite().all() and attention.probability[1, ..., 4:].max() == 0
    torch.testing.assert_close(attended, fused, rtol=2e-2, atol=5e-3)
