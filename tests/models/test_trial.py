"""What is built of a configuration is tried before it is used, and nothing of it stays."""

import time

import pytest
import torch
from transformers import ConditionalDetrConfig, ConvNextConfig

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.trial import MOST_MODULES, build_on_meta, try_detector
from tests.tiny import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 8192, "encoder_layers": 6}, "here: .* model of more than 1,000,000,000 parameters"),
        ({"encoder_layers": 5000}, f"here: .* model of more than {MOST_MODULES:,} modules"),
        ({"encoder_attention_heads": 0}, r"here: no model can be built .*ZeroDivisionError"),
    ],
)
def test_absurd_models_are_refused_before_they_take_memory(changes, message):
    """Whichever field says so, and at once: a layer more than is allowed is not begun."""
    began = time.process_time()
    with pytest.raises(DetectorLoadError, match=message):
        build_on_meta(FAMILIES["detr"], tiny_config("detr", **changes), "here")
    assert time.process_time() - began < 20


def test_a_large_public_model_is_within_the_limits():
    backbone = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[256, 512, 1024, 2048], out_features=["stage4"])
    model = build_on_meta(FAMILIES["conditional_detr"], ConditionalDetrConfig(backbone_config=backbone), "here")
    assert 3e8 < sum(parameter.numel() for parameter in model.parameters()) < 1e9
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_trial_leaves_no_trace(family, training):
    """Neither in the model, its batch norm statistics included, nor in the random numbers."""
    model = tiny_model(model_type=family).train(training)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = torch.random.get_rng_state()
    build_on_meta(FAMILIES[family], tiny_config(family), "here")
    try_detector(model, "here")
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_fails_in_its_first_forward_pass_is_named():
    model = tiny_model()
    model.model.input_projection = torch.nn.Conv2d(16, 40, 1)
    with pytest.raises(DetectorLoadError, match=r"here: no model can be built from these values \(RuntimeError: "):
        try_detector(model, "here")


def test_predictions_that_are_not_finite_are_refused():
    model = tiny_model()
    model.class_labels_classifier.weight.data.fill_(3e38)
    with pytest.raises(DetectorLoadError, match="here: what it predicts of an image of noise is not finite"):
        try_detector(model, "here")
