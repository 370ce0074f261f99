"""Families whose decoder computes attention itself, against the stock class with the queries of one group."""

import copy

import pytest
import torch

from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.own_attention import OwnAttentionDetector
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from tests.tiny import padded_batch, random_queries, request_for, tiny_model

BATCH = padded_batch(3)
NAMES = [name for name, family in FAMILIES.items() if issubclass(family, OwnAttentionDetector)]


@pytest.fixture(params=NAMES)
def family(request) -> str:
    return request.param


def stock_twin(model):
    """The stock class, built and loaded on its own."""
    twin = type(model).stock_class(type(model.config).from_dict(model.config.to_dict()))
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def further_queries(model) -> GroupRequest:
    return request_for({AUXILIARY: random_queries(5, model.width, anchor_size=model.anchor_size)}, maps=True)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_maps_are_the_stock_ones(family):
    """Beside another group; where stock probabilities are above zero the logarithm is theirs, too."""
    model = tiny_model(model_type=family)
    stock = stock_twin(model)(**BATCH, output_attentions=True)
    output = model(**BATCH, request=further_queries(model))
    group, padding = output.groups[OWN], ~output.memory_mask.flatten(1)[:, None, None]
    assert padding.any() and len(group.self_attention) == len(group.cross_attention) == 3
    for layer in range(3):
        for ours, theirs in (
            (group.self_attention[layer], stock.decoder_attentions[layer]),
            (group.cross_attention[layer], stock.cross_attentions[layer]),
        ):
            close(ours.probability, theirs)
            close(ours.log[theirs > 0], theirs[theirs > 0].log(), 1e-4)
        assert group.cross_attention[layer].probability.masked_select(padding).max() == 0
        assert group.cross_attention[layer].log.masked_select(padding).max() < -1e29


def test_maps_are_taken_before_dropout(family):
    """In the first layer, before which nothing is dropped."""
    model = tiny_model(model_type=family, attention_dropout=0.5)
    still = model(**BATCH, request=further_queries(model)).groups
    dropped = model.train()(**BATCH, request=further_queries(model)).groups
    for name in (OWN, AUXILIARY):
        close(dropped[name].self_attention[0].probability, still[name].self_attention[0].probability)
        assert dropped[name].self_attention[2].log.isfinite().all()
        assert (dropped[name].logits - still[name].logits).abs().max() > 0.01


def test_gradient_of_maps_is_finite_and_reaches_what_makes_them(family):
    model = tiny_model(model_type=family).train()
    groups = model(**BATCH, request=further_queries(model)).groups.values()
    maps = [attention for group in groups for attention in (*group.self_attention, *group.cross_attention)]
    sum((attention.probability * attention.log.clamp(min=-50)).sum() for attention in maps).backward()
    reached = [p.grad for p in model.model.decoder.layers[0].parameters() if p.grad is not None]
    assert len(reached) > 5 and all(gradient.isfinite().all() for gradient in reached)
    assert max(gradient.abs().max() for gradient in reached) > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("padded", [True, False])
def test_memory_is_the_stock_encoders(family, padded):
    """Whose mask is made elsewhere: with and without padding."""
    model = tiny_model(model_type=family)
    batch = BATCH if padded else {"pixel_values": BATCH["pixel_values"]}
    seen = []
    for detector, options in ((model, {"request": GroupRequest()}), (stock_twin(model), {})):
        encoder = detector.model.encoder
        hook = encoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        detector(**batch, **options)
        hook.remove()
    close(*seen, 1e-6)
    seen_without, given = model.encoder_arguments, []
    model.encoder_arguments = lambda memory: given.append(seen_without(memory)) or given[-1]
    model(**BATCH, request=GroupRequest())
    mask = given[0]["attention_mask"]
    assert mask.shape == (3, 1, 64, 64) and (mask[0] == 0).all() and (mask[1] < -1e38).any()


def test_groups_are_gone_after_a_pass_even_one_that_failed(family):
    model = tiny_model(model_type=family)
    before = model(**BATCH).logits

    def fail(*_):
        raise KeyError("a layer")

    hook = model.model.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(**BATCH, request=further_queries(model))
    hook.remove()
    assert all(module.groups is None for module, _ in model.attention_modules())
    assert torch.equal(model(**BATCH).logits, before)
    again = copy.deepcopy(model)
    close(again(**BATCH, request=further_queries(model)).groups[OWN].logits[-1], before)
    assert len(model(**BATCH, output_attentions=True).cross_attentions) == 3
