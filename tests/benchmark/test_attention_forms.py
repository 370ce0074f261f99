"""What is compared with the package's attention maps computes the same, gradients included."""

import pytest
import torch

from d3etr_hf.models import group_attention
from scripts.benchmarking.attention_forms import FORMS, custom_forms, why_not_compiled, with_forms


@pytest.mark.parametrize("read", ["both", "log", "probability"])
def test_custom_forms_and_their_gradient_are_the_plain_ones(read):
    """Guards against a comparison of times between two different things."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    scores[..., 5:] -= group_attention.PADDING
    weights = torch.randn(2, *scores.shape, generator=generator, dtype=torch.float64)
    weights[0, ..., 5:] = 0  # the logarithm of padding is read with weight zero
    found = []
    for forms in (group_attention.both_forms, custom_forms):
        leaf = scores.clone().requires_grad_()
        attention = forms(leaf * 1)  # the custom one overwrites
        values = {"log": (weights[0] * attention.log).sum(), "probability": (weights[1] * attention.probability).sum()}
        (sum(values.values()) if read == "both" else values[read]).backward()
        found.append((*attention.detach(), leaf.grad))
    for plain, custom in zip(*found, strict=True):
        torch.testing.assert_close(plain, custom)


def test_forms_are_patched_in_for_the_step_alone():
    plain, seen = group_attention.both_forms, []
    for forms in FORMS.values():
        with_forms(lambda: seen.append(group_attention.both_forms), forms)()
    assert seen == [plain, custom_forms] and group_attention.both_forms is plain


def test_plain_forms_compile_into_one_graph():
    assert why_not_compiled(group_attention.both_forms) is None
    assert why_not_compiled(lambda scores: group_attention.both_forms(scores + print())) is not None
