"""What is built of a configuration is tried before it is used, and nothing of it stays."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConvNextConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    ResNetConfig,
)

from d3etr_hf.errors import DatasetError, DetectorLoadError, ImageSizeError
from d3etr_hf.models import trial
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.new_models import new_model
from d3etr_hf.models.trial import MOST_MODULES, build_on_meta, try_detector
from d3etr_hf.outputs import OWN
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


@pytest.mark.parametrize("of", ["scores", "boxes"])
def test_predictions_that_are_not_finite_are_refused(of):
    model = tiny_model()
    head = model.class_labels_classifier if of == "scores" else model.bbox_predictor.layers[-1]
    head.weight.data.fill_(3e38 if of == "scores" else torch.nan)
    with pytest.raises(DetectorLoadError, match="here: what it predicts of an image of noise is not finite"):
        try_detector(model, "here")


def warnings_in(caplog) -> list:
    """News may be shown, too, where another test has asked for them."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_without_queries_is_refused(monkeypatch):
    """Whichever field says so: they are not always as many as `num_queries`."""
    model = tiny_model()
    nothing = SimpleNamespace(logits=torch.zeros(3, 1, 0, 3), boxes=torch.zeros(3, 1, 0, 4))
    monkeypatch.setattr(model, "try_image", lambda pixels: SimpleNamespace(groups={OWN: nothing}))
    with pytest.raises(DetectorLoadError, match="here: its values make a model without queries"):
        try_detector(model, "here")


def test_a_new_model_is_built_of_nothing_first(monkeypatch):
    """One that is too large is refused before it takes memory."""
    monkeypatch.setattr(trial, "MOST_PARAMETERS", 1000)
    options = {"backbone_config": {"model_type": "resnet"}}
    with pytest.raises(DetectorLoadError, match="here: its values make a model of more than 1,000 parameters"):
        new_model(options, ["circle"], "here")


def test_an_image_that_is_too_small_is_no_fault_of_the_values(caplog):
    """Group norm of one channel a group takes no level of a single pixel, of 64 pixels at a stride of 64."""
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=7,
    )
    stock = DeformableDetrForObjectDetection(config).eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stock(torch.rand(1, 3, 64, 64))
    try_detector(FAMILIES["deformable_detr"](config), "here")
    assert not warnings_in(caplog)


def test_what_fails_at_every_size_is_told_of_the_largest(monkeypatch):
    model, sides = tiny_model(), []

    def fail(pixels):
        sides.append(pixels.shape[-1])
        raise ValueError(f"nothing of {sides[-1]} pixels")

    monkeypatch.setattr(model, "try_image", fail)
    with pytest.raises(DetectorLoadError, match=r"here: .*\(ValueError: nothing of 256 pixels\)"):
        try_detector(model, "here")
    assert sides == [64, 128, 256]


def test_a_model_for_larger_images_is_said_to_be_untried(monkeypatch, caplog):
    model = tiny_model()

    def refuse(height, width):
        raise ImageSizeError(f"{height} x {width}")

    monkeypatch.setattr(model, "check_image", refuse)
    try_detector(model, "here")
    assert "here: not tried before it is used, since it takes no image of up to 1024 pixels a side" in caplog.text


def test_a_model_of_one_size_is_tried_at_that(monkeypatch, caplog):
    model, sizes = tiny_model(1, "rt_detr", anchor_image_size=[96, 64]), []
    forward = type(model).try_image
    monkeypatch.setattr(model, "try_image", lambda pixels: sizes.append(pixels.shape[2:]) or forward(model, pixels))
    try_detector(model, "here")
    assert sizes == [(96, 64)] and not warnings_in(caplog)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        NameError("name 'nonsense' is not defined"),
        ConnectionResetError("the network is down"),
    ],
)
def test_neither_bugs_nor_machines_are_blamed_on_the_values(monkeypatch, error):
    model = tiny_model()

    def fail(*_):
        raise error

    with pytest.raises(type(error)):
        build_on_meta(fail, model.config, "here")
    monkeypatch.setattr(model, "try_image", fail)
    with pytest.raises(type(error)):
        try_detector(model, "here")


def test_only_a_forward_pass_may_lack_an_attribute(monkeypatch):
    """Of fields like `return_dict` other kinds of output come; what builds has checked fields."""
    model = tiny_model()

    def fail(*_):
        raise AttributeError("'tuple' object has no attribute 'items'")

    with pytest.raises(AttributeError):
        build_on_meta(fail, model.config, "here")
    monkeypatch.setattr(model, "try_image", fail)
    with pytest.raises(DetectorLoadError, match="here: no model can be built .*AttributeError"):
        try_detector(model, "here")


def test_errors_that_say_what_to_do_stay_as_they_are():
    def fail(config):
        raise DatasetError("another remedy")

    with pytest.raises(DatasetError, match="^another remedy$"):
        build_on_meta(fail, tiny_config(), "here")


def test_what_is_wrong_in_the_package_itself_is_no_refusal(monkeypatch):
    """A criterion is made of fields that were checked: what fails there would be a bug."""
    model = tiny_model()
    monkeypatch.setattr(model, "criterion", lambda: [][0])
    with pytest.raises(IndexError):
        try_detector(model, "here")
