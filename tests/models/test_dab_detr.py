"""DAB-DETR against its stock class: boxes that layers refine, patterns, whose queries go where."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DabDetrForObjectDetection, ResNetConfig, TimmBackboneConfig

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models import D3etrDabDetrForObjectDetection
from d3etr_hf.models.detector import ROLES, inherit
from d3etr_hf.models.loading import ModelArguments, build_model
from d3etr_hf.models.query_adapters import LearnedQueries, QueryAdapter
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest, Queries
from tests.models.test_own_attention import close, stock_twin
from tests.tiny import padded_batch, perturb, random_labels, random_queries, request_for, targets_of, tiny_config
from tests.tiny import tiny_model as tiny_model_of

BATCH = padded_batch()
# each changes what the decoder computes
VARIANTS = [
    {"num_patterns": 2},
    {"keep_query_pos": True},
    {"normalize_before": True},
    {"random_refpoints_xy": True},
    {"temperature_height": 5, "temperature_width": 9, "sine_position_embedding_scale": 3.0},
    {"activation_function": "relu"},
    {"encoder_layers": 0},
]


def tiny_model(seed: int = 0, **changes) -> D3etrDabDetrForObjectDetection:
    return tiny_model_of(seed, "dab-detr", **changes)


def fresh_model(**changes) -> D3etrDabDetrForObjectDetection:
    torch.manual_seed(0)
    return D3etrDabDetrForObjectDetection(tiny_config("dab-detr", **changes))


def of_stock(model, queries: Queries):
    """What the stock class computes whose own queries are these: boxes, and content that it has no door for."""
    twin = stock_twin(model)
    twin.model.query_refpoint_embeddings.weight = nn.Parameter(queries.anchors.logit())

    def put_in(module, args, kwargs):
        batch = kwargs["inputs_embeds"].shape[0]
        return args, kwargs | {"inputs_embeds": queries.content.expand(batch, -1, -1)}

    twin.model.decoder.register_forward_pre_hook(put_in, with_kwargs=True)
    return twin(**BATCH, output_attentions=True)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_variant_equals_stock(changes, training):
    model = tiny_model(dropout=0.2, attention_dropout=0.2, **changes).train(training)
    twin = stock_twin(model)
    torch.manual_seed(3)
    stock = twin(**BATCH)
    torch.manual_seed(3)
    output = model(**BATCH, request=GroupRequest())
    group = output.groups[OWN]
    close(group.logits[-1], stock.logits)
    close(group.boxes[-1], stock.pred_boxes)
    assert group.boxes.shape[2] == len(output.queries) == model.query_count


def test_a_further_group_is_what_stock_computes_of_its_queries():
    """In every layer, since boxes are refined; maps, too."""
    generator = torch.Generator().manual_seed(2)
    anchors = torch.rand(5, 4, generator=generator) * 0.4 + 0.3
    queries = Queries(content=torch.randn(5, 32, generator=generator), anchors=anchors)
    model = tiny_model()
    stock = of_stock(model, queries)
    group = model(**BATCH, request=request_for({AUXILIARY: queries}, maps=True)).groups[AUXILIARY]
    close(group.logits[-1], stock.logits)
    close(group.boxes[-1], stock.pred_boxes)
    for layer in range(3):
        close(group.self_attention[layer].probability, stock.decoder_attentions[layer])
        close(group.cross_attention[layer].probability, stock.cross_attentions[layer])
    assert (stock.logits - of_stock(model, Queries(0 * queries.content, anchors=anchors)).logits).abs().max() > 0.01


def test_unweighted_losses_of_all_layers_and_their_gradient_are_the_stock_ones():
    """Gradient passes from a layer's boxes to the refinement of the layer before, and no further."""
    labels = random_labels([2, 3])
    model = tiny_model(auxiliary_loss=True).train()
    twin = stock_twin(model)
    stock = twin(**BATCH, labels=labels)
    criterion, targets = model.criterion(), targets_of(labels)
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    losses = {
        name: sum_ / 5 for name, sum_ in criterion.losses(group, targets, criterion.assign(group, targets)).items()
    }
    total = 0
    for name, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        expected = torch.stack([stock.loss_dict[f"{theirs}_{layer}"] for layer in (0, 1)] + [stock.loss_dict[theirs]])
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)
        # Transformers weighs the class loss 1, the authors 2
        total = total + {"class": 1, "l1": 5, "giou": 2}[name] * losses[name].sum()
    assert criterion.weights == {"class": 2, "l1": 5, "giou": 2}
    total.backward()
    stock.loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_auxiliary_loss_changes_nothing_that_is_computed():
    """Unlike DETR's (HF_NOTES 1)."""
    model, other = tiny_model(), tiny_model(auxiliary_loss=True)
    assert torch.equal(model(**BATCH).logits, other(**BATCH).logits)


# queries


@pytest.mark.parametrize("patterns", [0, 2])
def test_own_queries_are_boxes_with_no_content_or_patterns(patterns):
    model = tiny_model(num_patterns=patterns)
    queries = model.static_queries()
    weight = model.model.query_refpoint_embeddings.weight
    assert len(queries) == model.query_count == 7 * max(1, patterns)
    for pattern in range(max(1, patterns)):
        for query in range(7):
            place = 7 * pattern + query
            close(queries.anchors[place], weight[query].sigmoid())
            content = model.model.patterns.weight[pattern] if patterns else torch.zeros(32)
            assert torch.equal(queries.content[place], content)
    group = model(**BATCH, request=request_for({"again": queries})).groups
    close(group["again"].boxes, group[OWN].boxes)


def test_own_queries_are_told_apart_by_families_that_know_no_boxes():
    """By the position embeddings that the decoder's first layer adds to them."""
    model = tiny_model()
    seen = []
    hook = model.model.decoder.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    model(**BATCH)
    hook.remove()
    queries = model.static_queries()
    close(queries.position, seen[0][0])
    assert torch.pdist(queries.position).min() > 0.1
    for student in ("detr", "conditional_detr", "rt_detr"):
        group = tiny_model_of(0, student)(**BATCH, request=request_for({AUXILIARY: queries})).groups[AUXILIARY]
        assert (group.boxes[-1, 0, 0] - group.boxes[-1, 0, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("known", [0, 2, 4])
def test_anchors_of_other_families_become_boxes(known):
    """Boxes go over as they are; points get a fifth of the image around them, and no anchor is all of it."""
    anchors = torch.rand(5, 4, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3
    boxes = anchors.clone()
    if known < 4:
        boxes[:, 2:] = 0.2
    if known == 0:
        boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(5, 4)
    queries = random_queries()
    given = Queries(position=queries.position, anchors=anchors[:, :known] if known else None)
    model = tiny_model()
    group = model(**BATCH, request=request_for({AUXILIARY: given})).groups[AUXILIARY]
    stock = of_stock(model, Queries(queries.position, anchors=boxes.clamp(1e-5, 1 - 1e-5)))
    close(group.boxes[-1], stock.pred_boxes)
    close(group.logits[-1], stock.logits)


def test_queries_of_a_teacher_without_content_start_from_what_the_adapter_learns():
    """No content is zeros in any width; a projection's bias is then the same content for all."""
    teacher, student = tiny_model(hidden_size=48, encoder_attention_heads=4), tiny_model()
    queries = teacher.static_queries()
    assert queries.position.shape == queries.content.shape == (7, 48)
    stock = of_stock(student, Queries(torch.zeros(7, 32), anchors=queries.anchors))
    student.query_adapters[AUXILIARY] = QueryAdapter(48, 32)
    group = student(**BATCH, request=request_for({AUXILIARY: queries})).groups[AUXILIARY]
    close(group.boxes[-1], stock.pred_boxes)
    group.logits.sum().backward()
    assert student.query_adapters[AUXILIARY].projection.bias.grad.abs().sum() > 0


def test_learned_queries_of_a_further_group_are_boxes_alone():
    model = tiny_model()
    queries = model.new_queries(500)
    assert queries.content is None and queries.position is None
    logits = queries.anchors.logit()
    assert 0.9 < float(logits.std()) < 1.1 and abs(float(logits.mean())) < 0.1
    adapter = LearnedQueries(model.new_queries(6))
    assert [name for name, _ in adapter.named_parameters()] == ["anchor_logits"]
    centres = tiny_model(random_refpoints_xy=True).new_queries(2000).anchors[:, :2]
    assert abs(float(centres.mean()) - 0.5) < 0.03 and abs(float(centres.std()) - 12**-0.5) < 0.01


# start values and what trains


def test_start_values_are_the_authors():
    model = fresh_model(hidden_size=64, num_queries=400)
    anchors = model.model.query_refpoint_embeddings.weight
    assert 0.95 < float(anchors.detach().std()) < 1.05
    assert torch.all(model.class_embed.bias == -math.log(99)) and model.class_embed.weight.abs().max() > 0
    last = model.bbox_predictor.layers[-1]
    assert last.weight.abs().max() == last.bias.abs().max() == 0
    layer = model.model.decoder.layers[0]
    bound = math.sqrt(6 / (64 + 64))
    for matrix in (layer.self_attn.self_attn_value_proj.weight, model.model.encoder.query_scale.layers[0].weight):
        assert 0.97 * bound < float(matrix.detach().abs().max()) <= bound
    # not one of the transformer's: PyTorch's own bound
    assert float(model.bbox_predictor.layers[0].weight.detach().abs().max()) < 1.01 / math.sqrt(64)
    assert layer.self_attn.self_attn.output_proj.bias.abs().max() == 0
    assert model.model.encoder.layers[0].self_attn.q_proj.bias.abs().max() == 0
    assert layer.mlp.fc1.bias.abs().max() > 0
    assert torch.all(layer.mlp.activation_fn.weight == 0.25)
    boxes = model(**BATCH, request=GroupRequest()).groups[OWN].boxes
    close(boxes, anchors.sigmoid().expand_as(boxes))
    stock = DabDetrForObjectDetection(tiny_config("dab-detr", num_queries=400))
    assert float(stock.model.query_refpoint_embeddings.weight.detach().std()) < 0.05, "superfluous by now?"


def test_start_values_that_the_configuration_says():
    model = fresh_model(initializer_bias_prior_prob=0.2, random_refpoints_xy=True, num_queries=2000)
    assert torch.allclose(model.class_embed.bias, torch.tensor(-math.log(4)))
    weight = model.model.query_refpoint_embeddings.weight
    assert weight.requires_grad, "the authors' flag is on a view, and freezes nothing"
    centres, sizes = weight.detach()[:, :2].sigmoid(), weight.detach()[:, 2:]
    assert abs(float(centres.std()) - 12**-0.5) < 0.01 and 0.95 < float(sizes.std()) < 1.05


def test_what_a_checkpoint_lacks_starts_afresh_under_either_of_its_names(tmp_path):
    """Refinement and box head are one and the same."""
    model = perturb(fresh_model())
    for lost in ("bbox_predictor.layers.2.weight", "model.decoder.bbox_embed.layers.2.weight"):
        other = copy.deepcopy(model)
        other.initialise({lost})
        assert other.bbox_predictor.layers[2].weight.abs().max() == 0
        assert torch.equal(other.bbox_predictor.layers[2].bias, model.bbox_predictor.layers[2].bias)
        changed = {n for n, p in other.named_parameters() if not torch.equal(p, model.get_parameter(n))}
        assert changed == {"model.decoder.bbox_embed.layers.2.weight"}


def trainable(module) -> set[str]:
    return {name for name, value in module.named_parameters() if value.requires_grad}


def test_stem_and_first_stage_of_a_resnet_are_frozen(tmp_path):
    """Transformers freezes nothing here; timm's ResNet stands within a wrapper."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = fresh_model(backbone_config=ResNetConfig(**sizes, out_features=["stage2"]))
    names = {name for name, _ in model.backbone_module.named_parameters()}
    expected = {name for name in names if not name.startswith(("embedder.", "encoder.stages.0."))}
    assert expected and expected != names and trainable(model.backbone_module) == expected
    model.save_pretrained(tmp_path)
    assert trainable(D3etrDabDetrForObjectDetection.from_pretrained(tmp_path).backbone_module) == expected

    layers = {name: nn.Conv2d(3, 3, 1) for name in ("conv1", "layer1", "layer2")}
    wrapper = nn.Module()
    wrapper._backbone = nn.ModuleDict(layers)
    model.model.backbone.conv_encoder.model = wrapper
    model.config.backbone_config = TimmBackboneConfig(backbone="resnet18")
    model.freeze()
    assert trainable(wrapper) == {"_backbone.layer2.weight", "_backbone.layer2.bias"}


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [({"decoder_layers": 1}, "model.decoder.query_scale."), ({"encoder_layers": 0}, "model.encoder.query_scale.")],
)
def test_everything_that_trains_gets_a_gradient(changes, frozen):
    """Else two processes wait for each other: scales of a lone decoder layer, of no encoder layer."""
    model = tiny_model(**changes)
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    (group.logits.sum() + group.boxes.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    left = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert left and all(name.startswith(frozen) for name in left)


# what is one and the same


def test_refinement_and_box_head_stay_one(tmp_path):
    def is_one(model) -> bool:
        return all(
            ours is theirs
            for ours, theirs in zip(
                model.bbox_predictor.parameters(), model.model.decoder.bbox_embed.parameters(), strict=True
            )
        )

    model = tiny_model()
    model.keep_classes(torch.tensor([2, 0]), ["triangle", "circle"])
    assert is_one(model) and is_one(model.to_stock()) and is_one(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(".layers.2.bias" in name and "bbox" in name for name in saved) == 1
    loaded = D3etrDabDetrForObjectDetection.from_pretrained(tmp_path)
    assert is_one(loaded) and is_one(DabDetrForObjectDetection.from_pretrained(tmp_path))
    assert torch.equal(loaded(**BATCH).pred_boxes, model(**BATCH).pred_boxes)


def test_only_a_first_layer_projects_positions_for_cross_attention():
    """A student's first layer inherits that projection from the teacher's first, whichever it follows."""
    name = "model.decoder.layers.0.cross_attn.cross_attn_query_pos_proj.weight"
    rest = "model.decoder.layers.0.cross_attn.cross_attn_key_pos_proj.weight"
    for keep in (False, True):
        teacher, student = (
            tiny_model(seed, decoder_layers=depth, keep_query_pos=keep) for seed, depth in ((1, 4), (2, 2))
        )
        _, skipped = inherit(student, teacher, ROLES, torch.arange(3), [1, 3])
        assert not skipped
        source = teacher.state_dict()
        assert torch.equal(student.get_parameter(rest), source[rest.replace("0", "1", 1)])
        assert torch.equal(student.get_parameter(name), source[name.replace("0", "1", 1) if keep else name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "encoder_attention_heads": 5, "decoder_attention_heads": 5}, "hidden_size 30 .* of 4"),
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple of encoder_attention_heads, which is 4"),
        ({"num_patterns": -1}, "num_patterns is -1"),
        ({"query_dim": 2}, "query dimensions has to be 4"),
        ({"d_model": 32}, r"DabDetrConfig has no \['d_model'\]"),
    ],
)
def test_values_with_which_a_forward_pass_fails_are_refused(changes, message):
    options = tiny_config("dab-detr").to_dict()
    kept = ("hidden_size", "encoder_layers", "encoder_attention_heads", "decoder_attention_heads", "backbone_config")
    options = {name: options[name] for name in kept} | {"model_type": "dab-detr"} | changes
    with pytest.raises(DetectorLoadError, match=f"(?s)^model_config.*{message}"):
        build_model(ModelArguments(model_config=options), ["circle"])
