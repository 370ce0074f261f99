"""RT-DETRv2 beyond the contract: places, denoising, start values, what trains, tied heads."""

import copy
import math

import pytest
import torch

from d3etr_hf.models.rt_detr_v2 import D3etrRTDetrV2ForObjectDetection
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from tests.resampling import check_resampled
from tests.tiny import padded_batch, random_labels, random_queries, targets_of, tiny_config, tiny_model

PIXELS = padded_batch()["pixel_values"]
TARGETS = targets_of(random_labels([2, 3]))


def model_of(**changes) -> D3etrRTDetrV2ForObjectDetection:
    return tiny_model(0, "rt_detr_v2", **changes)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_places_and_weights_are_what_the_decoder_samples(method):
    check_resampled(
        model_of(decoder_method=method),
        PIXELS,
        [4, 4],
        nearest=method == "discrete",
        value=lambda module, memory: module.value_proj(memory),
        result=lambda module, found: module.output_proj(found),
    )


def test_groups_do_not_see_denoising_queries():
    """Nor do these see a further group; and they are the stock class's."""
    model = model_of().train()
    further, outputs = {AUXILIARY: random_queries(5, 32, anchor_size=4)}, []
    for targets, queries in ((None, further), (TARGETS, further), (TARGETS, {})):
        torch.manual_seed(3)
        outputs.append(model(PIXELS, request=GroupRequest(queries, targets=targets)))
    without, both, alone = outputs
    for group in (OWN, AUXILIARY):
        close(without.groups[group].logits, both.groups[group].logits)
        close(without.groups[group].boxes, both.groups[group].boxes)
    close(both.supervised["denoising"].group.boxes, alone.supervised["denoising"].group.boxes)
    torch.manual_seed(3)
    stock = model.to_stock().train()(PIXELS, labels=random_labels([2, 3]))
    denoising, own = stock.intermediate_logits.split(stock.denoising_meta_values["dn_num_split"], dim=2)
    close(both.supervised["denoising"].group.logits, denoising.transpose(0, 1))
    close(both.groups[OWN].logits, own.transpose(0, 1))


def test_start_values():
    torch.manual_seed(0)
    model = D3etrRTDetrV2ForObjectDetection(tiny_config("rt_detr_v2"))
    decoder = model.model.decoder
    for head in (*model.class_embed, *decoder.class_embed, model.model.enc_score_head):
        assert torch.all(head.bias == -math.log(99)) and head.weight.abs().max() > 0
    for head in (*decoder.bbox_embed, model.model.enc_bbox_head):
        assert head.layers[-1].weight.abs().max() == head.layers[-1].bias.abs().max() == 0
    for layer in decoder.layers:
        attention = layer.encoder_attn
        assert attention.sampling_offsets.weight.abs().max() == 0 < attention.sampling_offsets.bias.abs().max()
        assert attention.value_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 64), rel=0.02)
        assert layer.self_attn.q_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 128), rel=0.02)
    assert model.model.denoising_class_embed.weight[-1].abs().max() == 0


def test_offsets_that_are_rounded_do_not_train():
    assert all(p.requires_grad for p in model_of(freeze_backbone_batch_norms=False).parameters())
    model = model_of(decoder_method="discrete")
    off = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert off == {name for name, _ in model.named_parameters() if "sampling_offsets" in name} != set()


def test_heads_stay_tied(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    reduced = copy.deepcopy(model)
    reduced.keep_classes(torch.tensor([2, 0]), ["triangle", "circle"])
    for each in (model, reduced, reduced.to_stock(), type(model).from_pretrained(tmp_path)):
        for layer in range(3):
            assert each.class_embed[layer].weight is each.model.decoder.class_embed[layer].weight
            ours, theirs = each.bbox_embed[layer].layers[-1], each.model.decoder.bbox_embed[layer].layers[-1]
            assert ours.bias is theirs.bias


def test_levels_of_the_decoder_are_those_of_the_memory():
    with pytest.raises(ValueError, match="decoder_n_levels 3 must be num_feature_levels, 2"):
        D3etrRTDetrV2ForObjectDetection.check_config(tiny_config("rt_detr_v2", decoder_n_levels=3))
    with pytest.raises(ValueError, match="decoder_layers is 1"):
        D3etrRTDetrV2ForObjectDetection.check_config(tiny_config("rt_detr_v2", decoder_layers=1))
    D3etrRTDetrV2ForObjectDetection.check_config(tiny_config("rt_detr_v2"))
