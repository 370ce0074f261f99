"""DEIMv2 beyond the contract: its backbones and encoders, the matching-aware loss, unions, start values."""

import copy
import math

import pytest
import torch
from transformers import ConvNextConfig, DINOv3ViTConfig
from transformers.loss.loss_deimv2 import Deimv2Loss

from d3etr_hf.models.deimv2 import D3etrDeimv2ForObjectDetection
from d3etr_hf.models.detector import BACKBONE
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from tests.models.test_d_fine import hgnet_config
from tests.resampling import check_resampled
from tests.slow_reference import with_bins_of
from tests.tiny import padded_batch, perturb, random_labels, random_queries, targets_of, tiny_config, tiny_model
from tests.training.test_distribution_losses import check_every_term, model_of
from tests.training.test_family_losses import OBJECTS

LABELS = random_labels([2, 3])
TARGETS = targets_of(LABELS)
PIXELS = padded_batch(size=96)["pixel_values"]


def vision_transformer(**changes) -> dict:
    """Strides 8, 16 and 32 from a transformer of patches of 16."""
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 16,
        "num_register_tokens": 2,
        "image_size": 64,
        "out_indices": [1, 2, 3],
        "apply_layernorm": False,
    }
    levels = {"feat_strides": [8, 16, 32], "num_feature_levels": 3, "encode_proj_layers": [2]}
    channels = {"encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3}
    return {"backbone_config": DINOv3ViTConfig(**(options | changes))} | levels | channels


def light() -> dict:
    backbone = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_scale_init_value=1.0
    )
    return {"encoder_type": "lite", "backbone_config": backbone, "encoder_in_channels": [16], "feat_strides": [8, 16]}


def hgnet() -> dict:
    backbone = hgnet_config(False).backbone_config
    return {"backbone_config": backbone, "encoder_in_channels": [16, 16], "feat_strides": [8, 16]}


VARIANTS = {
    "vision transformer": vision_transformer(),
    "vision transformer, normed": vision_transformer(apply_layernorm=True),
    "light encoder": light(),
    "HGNet": hgnet(),
    "one box head": {"share_bbox_head": True},
    "no gates": {"use_gateway": False},
    "no trailing convolution": {"encoder_has_trailing_conv": False},
    "wider than its encoder": {"d_model": 48},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    model = tiny_model(0, "deimv2", **VARIANTS[request.param])
    model.check_config(model.config)
    return model.train()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_every_variant_equals_the_stock_class(variant):
    """In training, beside a further group, with its denoising queries; and whatever trains has a gradient."""
    torch.manual_seed(1)  # a vision transformer's positions are drawn in training
    stock = variant.to_stock().train()(PIXELS, labels=LABELS)
    further = {AUXILIARY: random_queries(5, variant.width, anchor_size=4)}
    torch.manual_seed(1)
    output = variant(PIXELS, request=GroupRequest(further, targets=TARGETS))
    split = stock.denoising_meta_values["dn_num_split"]
    denoising, own = (part.transpose(0, 1) for part in stock.intermediate_logits.split(split, dim=2))
    close(output.groups[OWN].logits, own[1:])
    close(output.supervised["denoising"].group.logits, denoising[1:])
    parts = [*output.groups.values(), *(part.group for part in output.supervised.values())]
    sum(part.logits.sum() + part.boxes.sum() for part in parts).backward()
    assert not [name for name, p in variant.named_parameters() if p.requires_grad and p.grad is None]


def test_every_variant_is_saved_and_reduced(variant, tmp_path):
    """With its tied heads, all of one weight where there is one box head."""
    variant.eval().save_pretrained(tmp_path)
    reduced = copy.deepcopy(variant)
    reduced.keep_classes(torch.tensor([2, 0, 1]), ["triangle", "circle", "rectangle"])
    assert torch.equal(reduced(PIXELS).logits, variant(PIXELS).logits[..., [2, 0, 1]])
    for each in (variant, reduced, reduced.to_stock(), type(variant).from_pretrained(tmp_path)):
        assert each.class_embed[1].weight is each.model.decoder.class_embed[1].weight
        biases = {each.bbox_embed[layer].layers[-1].bias for layer in range(3)}
        assert biases == {each.model.decoder.bbox_embed[layer].layers[-1].bias for layer in range(3)}
        assert len(biases) == (1 if variant.config.share_bbox_head else 3)
    for each in (type(variant), variant.stock_class):
        # copied out of the file, where they lie at odd addresses, for which some processors sum in another order
        loaded = copy.deepcopy(each.from_pretrained(tmp_path))
        assert torch.equal(loaded(PIXELS).logits, variant(PIXELS).logits)


@pytest.mark.parametrize("normed", [False, True])
def test_what_nothing_reads_of_a_vision_transformer_does_not_train(normed):
    model = tiny_model(0, "deimv2", **vision_transformer(apply_layernorm=normed))
    off = {name for name, p in model.named_parameters() if not p.requires_grad and model.role_of(name) == BACKBONE}
    unread = ("backbone.model.layer.3.", "mask_token", *(() if normed else (".backbone.norm.",)))
    expected = {name for name, _ in model.named_parameters() if any(part in name for part in unread)}
    assert off == expected and len(off) > 2


def test_places_and_weights_are_what_the_decoder_samples():
    check_resampled(tiny_model(0, "deimv2"), PIXELS, [4, 4])


# the loss


@pytest.mark.parametrize("objects", [OBJECTS, [0, 0]], ids=["objects", "no object"])
@pytest.mark.parametrize("unions", [True, False])
def test_every_term_is_what_the_authors_train_with(unions, objects, tmp_path):
    model = model_of("deimv2", "mal", use_dense_one_to_one=unions)
    check_every_term(model, with_bins_of(Deimv2Loss(model.config), model), "mal", objects, tmp_path, unions)


@pytest.mark.parametrize("alpha", [None, 0.4])
def test_terms_without_unions_are_those_of_the_stock_loss(alpha):
    """Layer by layer; its dictionary leaves out the last but one, and of denoising queries the last."""
    model = model_of("deimv2", "mal", use_dense_one_to_one=False, mal_alpha=alpha, focal_loss_gamma=1.5).train()
    torch.manual_seed(5)
    output, criterion = model(PIXELS, request=GroupRequest(targets=TARGETS)), model.criterion()
    torch.manual_seed(5)
    stock = model.to_stock().train()(PIXELS, labels=LABELS).loss_dict
    supervised = output.supervised
    parts = [
        (output.groups[OWN], None, {0: "_aux_1", 2: ""}, 5),
        (supervised["first_head"].group, None, {0: "_aux_0"}, 5),
        (supervised["proposals"].group, None, {0: "_aux_2"}, 5),
    ]
    for name, suffixes in (("denoising", {0: "_dn_1", 1: "_dn_2"}), ("denoising_first_head", {0: "_dn_0"})):
        part = supervised[name]
        parts.append((part.group, part.assignment, suffixes, 5 * part.repeats))
    for group, assignment, suffixes, objects in parts:
        assignment = criterion.assign(group, TARGETS) if assignment is None else assignment
        terms = criterion.losses(group, TARGETS, assignment)
        for term, name in (("class", "loss_mal"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
            for layer, suffix in suffixes.items():
                ours = criterion.weights[term] * terms[term][layer] / objects
                torch.testing.assert_close(ours, stock[f"{name}{suffix}"], rtol=1e-4, atol=1e-5)


# start values


def test_start_values():
    torch.manual_seed(0)
    model = D3etrDeimv2ForObjectDetection(tiny_config("deimv2"))
    decoder = model.model.decoder
    for head in (*decoder.class_embed, model.model.enc_score_head):
        assert torch.all(head.bias == -math.log(99)) and head.weight.abs().max() > 0
    for head in (*decoder.bbox_embed, decoder.pre_bbox_head, model.model.enc_bbox_head):
        assert head.layers[-1].weight.abs().max() == head.layers[-1].bias.abs().max() == 0
    for layer in decoder.layers:
        assert layer.gateway.gate.weight.abs().max() == 0
        assert layer.mlp.up_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (32 + 24)), rel=0.02)
        assert layer.mlp.up_proj.bias.abs().max() == 0
        assert torch.all(layer.final_layer_norm.weight == 1)
    for linear in decoder.query_pos_head.layers:
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.1)
    # as PyTorch starts it
    assert model.model.enc_output[0].weight.abs().max().item() == pytest.approx(1 / math.sqrt(32), rel=0.02)
    assert model(PIXELS).logits.isfinite().all()
    assert (perturb(model)(PIXELS).pred_boxes.diff(dim=1).abs().max()) > 0


def test_maps_that_cannot_be_fused():
    with pytest.raises(ValueError, match="encoder_fuse_op 'cat' must be 'sum'"):
        D3etrDeimv2ForObjectDetection.check_config(tiny_config("deimv2", encoder_fuse_op="cat"))
    with pytest.raises(ValueError, match=r"decoder_in_channels \[32\] must hold .* each of the encoder's 2 levels"):
        D3etrDeimv2ForObjectDetection.check_config(tiny_config("deimv2", **light(), decoder_in_channels=[32]))
