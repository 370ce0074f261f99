"""RF-DETR's backbone: which images it takes and what of it trains; the rest is in test_group_detr.py."""

import pytest
import torch
from transformers import ConvNextConfig, RfDetrDinov2Config

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.models.rf_detr import D3etrRfDetrForObjectDetection
from d3etr_hf.outputs import OWN, GroupRequest
from tests.tiny import padded_batch, tiny_config, tiny_model


def with_backbone(**changes):
    options = tiny_config("rf_detr").backbone_config.to_dict() | changes
    return tiny_config("rf_detr", backbone_config=RfDetrDinov2Config(**options))


def test_only_squares_are_taken():
    """Of other images Transformers puts patches into windows in one order and takes them out in another."""
    model = tiny_model(model_type="rf_detr")
    with pytest.raises(ImageSizeError, match=r"64 x 32 pixels.* squares only.*multiple of 16"):
        model(torch.zeros(1, 3, 32, 64), request=GroupRequest())
    backbone = model.backbone_module
    for height, width, kept in ((64, 64, True), (32, 64, False)):
        count = height * width // 64
        numbered = torch.arange(count + 1.0).view(1, -1, 1).expand(-1, -1, 16)
        windows = backbone.embeddings.window_partition(numbered, height, width)[:, 1:]
        found = backbone.window_unpartition(windows, height, width).flatten()[::16]
        assert torch.equal(found, torch.arange(1.0, count + 1)) == kept


def test_an_undivided_image_may_be_of_any_shape():
    torch.manual_seed(0)
    model = D3etrRfDetrForObjectDetection(with_backbone(num_windows=1)).eval()
    pixels = torch.randn(1, 3, 40, 72)
    own = model(pixels, request=GroupRequest()).groups[OWN]
    assert torch.equal(own.logits[-1], model.to_stock()(pixels).logits)


@pytest.mark.parametrize(
    "options", [{}, {"apply_layernorm": False}, {"use_mask_token": False, "use_swiglu_ffn": True}]
)
def test_all_of_the_backbone_trains_but_what_nothing_reads(options):
    torch.manual_seed(0)
    model = D3etrRfDetrForObjectDetection(with_backbone(**options)).train()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    output = model.requires_grad_(True)(**padded_batch(), request=GroupRequest())
    groups = [output.groups[OWN], *(part.group for part in output.supervised.values())]
    sum(group.logits.sum() + group.boxes.sum() for group in groups).backward()
    assert trains == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith("model.backbone.backbone.encoder.layer.3.") for name in trains)


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda: tiny_config("rf_detr", num_feature_levels=2), "num_feature_levels is 2"),
        (lambda: with_backbone(reshape_hidden_states=False), "reshape_hidden_states is false"),
        (lambda: with_backbone(num_windows=0), "num_windows is 0"),
        (lambda: with_backbone(num_attention_heads=3), "hidden_size 16 must be a multiple of num_attention_heads"),
        (lambda: with_backbone(patch_size=[8, 8]), r"patch_size is \[8, 8\]"),
        (lambda: tiny_config("rf_detr", backbone_config=ConvNextConfig()), "backbone_config is a convnext"),
    ],
)
def test_a_configuration_that_would_fail_later_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        D3etrRfDetrForObjectDetection.check_config(config())
