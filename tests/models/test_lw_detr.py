"""LW-DETR's backbone and levels; the rest is in test_group_detr.py."""

import pytest
import torch
from transformers import LwDetrViTConfig

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.models.lw_detr import D3etrLwDetrForObjectDetection
from d3etr_hf.outputs import OWN, GroupRequest
from tests.tiny import padded_batch, request_for, tiny_config, tiny_model


@pytest.mark.parametrize("scales", [[1.0], [2.0, 0.5], [2.0, 1.0, 0.5]])
def test_levels(scales):
    """As many tokens as the stock model has; places are compared on the second finest level, or the only one."""
    model, seen = tiny_model(model_type="lw_detr", projector_scale_factors=scales), []
    stock, batch = model.to_stock(), padded_batch(size=80)
    stock.model.decoder.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    expected = stock(**batch)
    output = model(**batch, request=request_for(maps=True))
    torch.testing.assert_close(output.groups[OWN].logits[-1], expected.logits, atol=1e-5, rtol=0)
    shape = seen[0]["spatial_shapes_list"][min(1, len(scales) - 1)]
    mask = torch.nn.functional.interpolate(batch["pixel_mask"][None].float(), size=shape)[0].bool()
    assert torch.equal(output.memory_mask, mask) and not mask.all()
    tokens = seen[0]["encoder_hidden_states"].shape[1]
    model.config.num_queries = tokens + 1
    with pytest.raises(ImageSizeError, match=f"80 x 80 pixels has only {tokens} tokens"):
        model(**batch, request=GroupRequest())


def test_images_of_any_proportions_are_taken():
    model, pixels = tiny_model(model_type="lw_detr"), torch.randn(1, 3, 32, 80)
    own = model(pixels, request=GroupRequest()).groups[OWN]
    torch.testing.assert_close(own.logits[-1], model.to_stock()(pixels).logits, atol=1e-5, rtol=0)


def test_all_trains_but_what_nothing_reads():
    torch.manual_seed(0)
    model = D3etrLwDetrForObjectDetection(tiny_config("lw_detr")).train()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    output = model.requires_grad_(True)(**padded_batch(), request=GroupRequest())
    groups = [output.groups[OWN], *(part.group for part in output.supervised.values())]
    sum(group.logits.sum() + group.boxes.sum() for group in groups).backward()
    assert trains == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith("model.backbone.backbone.encoder.layer.3.") for name in trains)


def test_a_configuration_that_would_fail_later_is_refused():
    with pytest.raises(ValueError, match="projector_scale_factors is empty"):
        D3etrLwDetrForObjectDetection.check_config(tiny_config("lw_detr", projector_scale_factors=[]))
    options = tiny_config("lw_detr").backbone_config.to_dict() | {"use_absolute_position_embeddings": False}
    with pytest.raises(ValueError, match="use_absolute_position_embeddings is false"):
        D3etrLwDetrForObjectDetection.check_config(tiny_config("lw_detr", backbone_config=LwDetrViTConfig(**options)))
