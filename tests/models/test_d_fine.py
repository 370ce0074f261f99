"""D-FINE beyond the contract: distributions, layers in evaluation, denoising, places, start values, what trains."""

import copy
import math

import pytest
import torch
from transformers import HGNetV2Config
from transformers.models.d_fine.modeling_d_fine import DFineLQE

from d3etr_hf.errors import DetectorLoadError, ImageSizeError
from d3etr_hf.models.d_fine import D3etrDFineForObjectDetection
from d3etr_hf.models.loading import ModelArguments, build_model
from d3etr_hf.outputs import AUXILIARY, NO_OBJECT, OWN, GroupRequest
from tests.resampling import check_resampled
from tests.tiny import padded_batch, perturb, random_labels, random_queries, targets_of, tiny_config, tiny_model

PIXELS = padded_batch()["pixel_values"]
LABELS = random_labels([2, 3])


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def model_of(seed: int = 0, **changes) -> D3etrDFineForObjectDetection:
    """Perturbed but for how far bins reach, which never trains."""
    model = tiny_model(seed, "d_fine", **changes)
    with torch.no_grad():
        model.model.decoder.reg_scale.fill_(model.config.reg_scale)
        model.model.decoder.up.fill_(model.config.up)
    return model


def stock_of(model):
    """Built and loaded on its own."""
    stock = type(model).stock_class(type(model.config).from_dict(model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def request_with(queries: int = 0, **options) -> GroupRequest:
    further = {AUXILIARY: random_queries(queries, 32, anchor_size=4)} if queries else {}
    return GroupRequest(further, **options)


# predictions


def test_layers_in_evaluation_follow_from_the_hidden_states():
    """Transformers gives the last only; here by the formula, from what it gives of every layer."""
    model = model_of()
    group = model(PIXELS, request=GroupRequest()).groups[OWN]
    stock = stock_of(model)
    hidden = stock(PIXELS).intermediate_hidden_states
    decoder, corners = stock.model.decoder, 0
    bins = [float(value) for value in distances(model.config)]
    for layer in range(3):
        before = hidden[layer - 1] if layer else 0
        corners = corners + stock.bbox_embed[layer](hidden[layer] + before)
        close(group.box_distribution[layer].flatten(2), corners)
        close(group.logits[layer], decoder.lqe_layers[layer](stock.class_embed[layer](hidden[layer]), corners))
        close(group.boxes[layer], boxes_by_hand(group.box_distribution[layer], group.box_reference, bins))
    assert torch.equal(group.boxes[-1], stock(PIXELS).pred_boxes)
    assert not model.model.decoder.training


def distances(config) -> list[float]:
    """The weighting function W(n) of the paper (its equation 5), as a loop."""
    bins, upper = config.max_num_bins, abs(config.up) * config.reg_scale
    step = (upper + 1) ** (2 / (bins - 2))
    right = [step**n - 1 for n in range(1, bins // 2)]
    return [-2 * upper, *(-value for value in reversed(right)), 0.0, *right, 2 * upper]


def boxes_by_hand(distribution, reference, bins):
    """Boxes whose edges lie where their distributions say, on average."""
    scale = 4.0
    moved = [
        [
            [sum(p * w for p, w in zip(edge.softmax(-1).tolist(), bins, strict=True)) / scale for edge in query]
            for query in image
        ]
        for image in distribution
    ]
    boxes = []
    for image, rows in zip(reference.tolist(), moved, strict=True):
        boxes.append([])
        for (x, y, w, h), (left, top, right, bottom) in zip(image, rows, strict=True):
            x0, x1 = x - w / 2 - left * w, x + w / 2 + right * w
            y0, y1 = y - h / 2 - top * h, y + h / 2 + bottom * h
            boxes[-1].append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    return torch.tensor(boxes)


def test_bins_are_distances_in_units_of_the_reference_box():
    model = model_of(max_num_bins=8, reg_scale=2.0, up=0.4)
    bins = model(PIXELS, request=GroupRequest()).groups[OWN].box_bins
    close(bins, torch.tensor(distances(model.config)) / 2)
    assert bins.diff().min() > 0


@pytest.mark.parametrize("training", [False, True])
def test_boxes_of_every_group_are_those_of_their_distributions(training):
    model = model_of().train(training)
    request = request_with(5, targets=targets_of(LABELS))
    output = model(PIXELS, request=request)
    groups = [output.groups[OWN], output.groups[AUXILIARY]]
    groups += [output.supervised["denoising"].group] if training else []
    bins = distances(model.config)
    for group in groups:
        assert group.box_distribution.shape == (*group.boxes.shape, 33)
        assert group.box_distribution.dtype == group.box_reference.dtype == torch.float32
        for layer in range(3):
            close(group.boxes[layer], boxes_by_hand(group.box_distribution[layer], group.box_reference, bins))


def test_training_equals_the_stock_class_with_its_denoising_queries():
    model = model_of().train()
    stock = stock_of(model).train()
    torch.manual_seed(5)
    theirs = stock(PIXELS, labels=LABELS)
    torch.manual_seed(5)
    output = model(PIXELS, request=request_with(5, targets=targets_of(LABELS)))
    split = theirs.denoising_meta_values["dn_num_split"]
    denoising, own = (part.transpose(0, 1) for part in theirs.intermediate_logits.split(split, dim=2))
    denoising_boxes, own_boxes = (
        part.transpose(0, 1) for part in theirs.intermediate_reference_points.split(split, dim=2)
    )
    supervised = output.supervised
    expected = {
        "denoising": (denoising[1:], denoising_boxes[1:]),
        "denoising_first_head": (denoising[:1], denoising_boxes[:1]),
        "first_head": (own[:1], own_boxes[:1]),
        "proposals": (theirs.enc_topk_logits[None], theirs.enc_topk_bboxes[None]),
    }
    assert set(supervised) == {*expected, "auxiliary_first_head"}
    for name, (logits, boxes) in expected.items():
        close(supervised[name].group.logits, logits)
        close(supervised[name].group.boxes, boxes)
    close(output.groups[OWN].logits, own[1:])
    close(output.groups[OWN].boxes, own_boxes[1:])
    reference = theirs.initial_reference_points.split(split, dim=2)[1]
    for layer in range(3):
        close(output.groups[OWN].box_reference, reference[:, layer])


def test_denoising_queries_are_given_their_objects():
    """Query by query: positive ones the object that they were made of, group by group, the others none."""
    model = model_of().train()
    supervised = model(PIXELS, request=request_with(targets=targets_of(LABELS))).supervised
    repeats = 10 // 3  # of ten queries asked for, as many groups as the image with most objects leaves
    expected = torch.full((2, 2 * 3 * repeats), NO_OBJECT)
    for image, objects in enumerate([2, 3]):
        for group in range(repeats):
            for index in range(objects):
                expected[image, group * 6 + index] = index
    for name, layers in (("denoising", 3), ("denoising_first_head", 1)):
        assert supervised[name].repeats == repeats
        assert torch.equal(supervised[name].assignment, expected.expand(layers, -1, -1))


def test_groups_do_not_see_denoising_queries():
    """Nor do these see a further group."""
    model = model_of().train()
    outputs = []
    for targets, queries in ((None, 5), (targets_of(LABELS), 5), (targets_of(LABELS), 0)):
        torch.manual_seed(3)
        outputs.append(model(PIXELS, request=request_with(queries, targets=targets)))
    without, both, alone = outputs
    for group in (OWN, AUXILIARY):
        close(without.groups[group].logits, both.groups[group].logits)
        close(without.groups[group].boxes, both.groups[group].boxes)
    close(both.supervised["denoising"].group.boxes, alone.supervised["denoising"].group.boxes)
    model.model.denoising_class_embed.weight.data.normal_()
    torch.manual_seed(3)
    other = model(PIXELS, request=request_with(5, targets=targets_of(LABELS)))
    close(other.groups[OWN].logits, both.groups[OWN].logits)
    assert (other.supervised["denoising"].group.logits - both.supervised["denoising"].group.logits).abs().max() > 0.01


# places


@pytest.mark.parametrize("points", [4, [2, 3]], ids=["points", "points by level"])
def test_places_and_weights_are_what_the_decoder_samples(points):
    model = model_of(decoder_n_points=points)
    check_resampled(model, PIXELS, points if isinstance(points, list) else [points] * 2)


def test_places_of_the_discrete_method_are_the_pixels_that_are_read():
    check_resampled(model_of(decoder_method="discrete"), PIXELS, [4, 4], nearest=True)


# start values, what trains, tied heads


def test_start_values():
    """As the authors' code: boxes at their anchors, a prior of 0.01, gates half open, no quality yet."""
    torch.manual_seed(0)
    model = D3etrDFineForObjectDetection(tiny_config("d_fine", num_labels=3))
    decoder = model.model.decoder
    for head in (*decoder.class_embed, model.model.enc_score_head):
        assert torch.all(head.bias == -math.log(99)) and head.weight.abs().max() > 0
    quality = [module.reg_conf for module in decoder.modules() if isinstance(module, DFineLQE)]
    for head in (*decoder.bbox_embed, *quality, decoder.pre_bbox_head, model.model.enc_bbox_head):
        assert head.layers[-1].weight.abs().max() == head.layers[-1].bias.abs().max() == 0
        assert head.layers[0].weight.abs().max() > 0
    for layer in decoder.layers:
        assert layer.gateway.gate.weight.abs().max() == layer.gateway.gate.bias.abs().max() == 0
        assert layer.encoder_attn.sampling_offsets.weight.abs().max() == 0
        assert layer.encoder_attn.sampling_offsets.bias.abs().max() > 0.9
        assert layer.mlp.layers[0].weight.abs().max().item() == pytest.approx(math.sqrt(6 / (32 + 48)), rel=0.01)
        assert layer.self_attn.q_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (4 * 32)), rel=0.02)
        assert layer.self_attn.q_proj.bias.abs().max() == 0
    assert model.model.encoder.aifi[0].layers[0].self_attn.v_proj.bias.abs().max() == 0
    assert decoder.reg_scale.item() == 4 and decoder.up.item() == 0.5
    assert model.model.denoising_class_embed.weight[-1].abs().max() == 0
    first = model.eval()(PIXELS, request=GroupRequest())
    close(first.groups[OWN].box_reference, first.queries.anchors, 1e-4)
    close(first.groups[OWN].boxes, first.queries.anchors.expand(3, -1, -1, -1), 1e-4)


def hgnet_config(frozen: bool, **changes):
    backbone = HGNetV2Config(
        stem_channels=[3, 4, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[4, 4, 8, 8],
        stage_out_channels=[8, 16, 16, 32],
        hidden_sizes=[8, 16, 16, 32],
        stage_num_blocks=[1] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False] * 4,
        stage_kernel_size=[3] * 4,
        stage_numb_of_layers=[1] * 4,
        out_features=["stage2", "stage3"],
    )
    options = {"encoder_in_channels": [16, 16], "feat_strides": [8, 16], "freeze_backbone_batch_norms": frozen}
    return tiny_config("d_fine", backbone_config=backbone, **options, **changes)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_trains(frozen):
    """Large models' stems are frozen with their batch norm; how far bins reach never trains."""
    model = D3etrDFineForObjectDetection(hgnet_config(frozen))
    off = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    stem = {name for name, _ in model.named_parameters() if ".embedder." in name}
    unread = {name for name, _ in model.named_parameters() if ".stages.3." in name}
    assert stem and unread
    assert model(PIXELS).logits.isfinite().all()
    scales = {"model.decoder.reg_scale", "model.decoder.up"}
    assert off == (scales | unread | stem if frozen else scales | unread)


def test_offsets_that_are_rounded_do_not_train():
    """No gradient could reach them, and distributed training would wait for it."""
    model = model_of(decoder_method="discrete").train()
    off = {name for name, p in model.named_parameters() if not p.requires_grad}
    offsets = {name for name, _ in model.named_parameters() if "sampling_offsets" in name}
    assert offsets and off == offsets | {"model.decoder.reg_scale", "model.decoder.up"}
    group = model(PIXELS, request=request_with(3, cross_attention=True)).groups[AUXILIARY]
    assert 0 < group.cross_attention[0].places.min() and group.cross_attention[0].places.max() < 1


def test_heads_stay_tied(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    reduced = copy.deepcopy(model)
    reduced.keep_classes(torch.tensor([2, 0]), ["triangle", "circle"])
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, copy.deepcopy(model), reduced, model.to_stock(), reduced.to_stock(), loaded):
        for layer in range(3):
            assert each.class_embed[layer].weight is each.model.decoder.class_embed[layer].weight
            ours, theirs = each.bbox_embed[layer].layers[-1], each.model.decoder.bbox_embed[layer].layers[-1]
            assert ours.bias is theirs.bias
        assert each.class_embed[0].weight is not each.class_embed[1].weight
    assert len(reduced.class_embed[0].weight) == 2


def test_an_optimizer_step_after_reducing_classes_moves_both_names():
    model = model_of().train()
    model.keep_classes(torch.tensor([2, 0]), ["triangle", "circle"])
    before = model(PIXELS).logits
    perturb(model)
    stock = model.to_stock().train()
    assert torch.equal(stock(PIXELS).logits, model(PIXELS).logits)
    assert (before - model(PIXELS).logits).abs().max() > 0.01


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_idx": 1}, "eval_idx 1 must be the last of 3"),
        ({"eval_idx": -2}, "eval_idx -2 must be the last"),
        ({"decoder_layers": 1}, "decoder_layers is 1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true"),
        ({"learn_initial_query": True}, "learn_initial_query must be false"),
        ({"use_focal_loss": False}, "use_focal_loss must be true"),
        ({"max_num_bins": 7}, "max_num_bins 7 must be an even number"),
        ({"top_prob_values": 40}, "top_prob_values 40 must be in 1"),
        ({"encoder_hidden_dim": 30}, "encoder_hidden_dim 30 must be a multiple of 4"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads, which is 5"),
        ({"decoder_in_channels": [32]}, r"decoder_in_channels \[32\] must hold encoder_hidden_dim, 32"),
        ({"encoder_in_channels": [8]}, r"encoder_in_channels \[8\]: the backbone gives 2 levels"),
        ({"num_feature_levels": 1}, "num_feature_levels 1"),
        ({"feat_strides": [4]}, r"feat_strides \[4\]"),
        ({"encode_proj_layers": [2]}, "encode_proj_layers .*there are levels 0 to 1"),
    ],
)
def test_configurations_that_transformers_fails_with(changes, message):
    options = {name: getattr(tiny_config("d_fine"), name) for name in GIVEN} | {"model_type": "d_fine"}
    options["backbone_config"] = options["backbone_config"].to_dict()
    with pytest.raises(DetectorLoadError, match=message):
        build_model(ModelArguments(model_config=options | changes), ["circle", "rectangle"])


GIVEN = (
    "backbone_config",
    "d_model",
    "encoder_hidden_dim",
    "encoder_in_channels",
    "feat_strides",
    "encode_proj_layers",
    "encoder_attention_heads",
    "decoder_in_channels",
    "num_feature_levels",
    "decoder_layers",
    "decoder_attention_heads",
)


def test_an_image_with_fewer_tokens_than_queries():
    with pytest.raises(ImageSizeError, match="num_queries is 7, but .* 8 x 8 pixels has only 5 tokens"):
        model_of()(PIXELS[..., :8, :8], request=GroupRequest())
