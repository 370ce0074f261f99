"""Deformable DETR beyond the contract, and the contract for its forms that the tiny configuration is not."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from transformers import DeformableDetrForObjectDetection

from d3etr_hf.errors import DetectorLoadError, ImageSizeError
from d3etr_hf.models import D3etrDeformableDetrForObjectDetection
from d3etr_hf.models.detector import inherit
from d3etr_hf.models.loading import ModelArguments, build_model, load_detector
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest, Queries
from tests import slow_reference, tiny
from tests.models.test_contract import (  # noqa: F401
    test_checkpointing_gives_the_same_gradient_of_maps_and_predictions,
    test_classes_that_are_kept_score_as_before,
    test_gradient_reaches_own_queries_and_none_that_were_detached,
    test_groups_do_not_see_each_other,
    test_inheriting_all_parts_gives_the_teachers_outputs,
    test_losses_equal_the_stock_loss,
    test_maps_are_distributions_over_the_image,
    test_new_queries_are_learned_in_a_further_group,
    test_own_group_equals_stock_forward,
    test_own_queries_in_another_group_give_the_same,
    test_predictions_leave_autocast_in_full_precision,
    test_predictions_of_a_model_in_half_precision_are_wide,
    test_queries_of_another_family_and_width_are_taken,
    test_saved_model_is_a_plain_stock_checkpoint,
    test_static_queries_are_those_of_a_forward_pass,
    test_stock_twin_shares_tensors,
    test_what_ground_truth_alone_supervises,
    test_what_trains_gets_a_gradient_and_what_loads_trains_the_same,
)
from tests.models.test_loading import model_options
from tests.tiny import padded_batch, perturb, random_labels, random_queries, request_for, targets_of, tiny_model
from tests.training.test_every_pair import step

FAMILY = "deformable_detr"
ONE_LEVEL = {
    "backbone_config": tiny.tiny_config().backbone_config,
    "num_feature_levels": 1,
    "with_box_refine": False,
}
REFINED, TWO_STAGE = {}, {"two_stage": True}
FORMS = {"one level": ONE_LEVEL, "refined": REFINED, "two-stage": TWO_STAGE}
BATCH = padded_batch(3, 80)


@pytest.fixture(params=["one level", "two-stage"])
def family(request, monkeypatch) -> str:
    """The contract's tests take a family's name: here that of another form."""
    form, options = FORMS[request.param], tiny.TINY_CONFIGS[FAMILY]
    monkeypatch.setitem(tiny.TINY_CONFIGS, FAMILY, lambda **changes: options(**(form | changes)))
    return FAMILY


@pytest.fixture
def any_family(family) -> str:
    return family


@pytest.fixture(params=FORMS)
def form(request) -> dict:
    return FORMS[request.param]


def model_of(form: dict, **changes) -> D3etrDeformableDetrForObjectDetection:
    return tiny_model(0, FAMILY, **(form | changes))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_every_layer_of_two_stages_equals_a_stock_model_that_ends_there():
    """The last pair of heads is the proposals': it goes on to the shorter model's end."""
    model = model_of(TWO_STAGE)
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    for layer in range(3):
        stock = DeformableDetrForObjectDetection(
            tiny.tiny_config(FAMILY, decoder_layers=layer + 1, **TWO_STAGE)
        ).eval()
        weights = {
            name.replace("_embed.3.", f"_embed.{layer + 1}."): value for name, value in model.state_dict().items()
        }
        heads = {name: value for name, value in model.state_dict().items() if f"_embed.{layer + 1}." not in name}
        assert not stock.load_state_dict(heads | weights, strict=False).missing_keys
        expected = stock(**BATCH)
        close(group.logits[layer], expected.logits)
        close(group.boxes[layer], expected.pred_boxes)


# places in the image


def offsets_off(model) -> None:
    """Attention then looks at its anchor's centre alone."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "sampling_offsets"):
                module.sampling_offsets.weight.zero_()
                module.sampling_offsets.bias.zero_()


def test_places_are_in_the_unpadded_image(form):
    """Without offsets the first layer looks at the anchors, in every level, whatever the padding."""
    model = model_of(form)
    offsets_off(model)
    output = model(**BATCH, request=request_for(maps=True))
    for image in range(3):
        anchors = output.queries.anchors
        centres = (anchors[image] if anchors.dim() == 3 else anchors)[:, :2]
        places = output.groups[OWN].cross_attention[0].places[image]
        close(places, centres[None, :, None].expand_as(places))
    assert output.groups[OWN].cross_attention[0].places.shape[3] == 4 * model.config.num_feature_levels


@pytest.mark.parametrize("autocast", [False, True])
def test_shares_of_padding_are_exact(form, autocast):
    """In bfloat16, in which group norms leave autocast on a CPU, 16 of 20 columns would be 0.8008 of them."""
    model, found = model_of(form), []
    offsets_off(model)
    attention = model.model.decoder.layers[0].encoder_attn.attn
    attention.register_forward_hook(lambda module, args, output: found.append((args[2], args[4])))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**BATCH, request=request_for(maps=True))
    (shapes, locations), places = found[0], output.groups[OWN].cross_attention[0].places.unflatten(3, (-1, 4))
    inexact = 0
    for level, (height, width) in enumerate(shapes):
        for image, mask in enumerate(BATCH["pixel_mask"]):
            columns = sum(int(mask[0, column * 80 // width]) for column in range(width))
            rows = sum(int(mask[row * 80 // height, 0]) for row in range(height))
            valid = torch.tensor([columns / width, rows / height])
            inexact += int((valid.bfloat16() - valid).abs().max() > 5e-4)
            close(locations[image, :, :, level].transpose(0, 1), places[image, :, :, level] * valid, 1e-5)
    assert inexact


def test_memory_mask_is_the_second_finest_level(form):
    mask = model_of(form)(**BATCH, request=GroupRequest()).memory_mask
    assert mask.shape == (3, 10, 10)  # stride 8
    expected = BATCH["pixel_mask"][:, ::8, ::8].bool()
    assert torch.equal(mask, expected) and not mask.all()


# the loss


def test_every_layers_terms_are_the_stock_losses(form):
    model, labels = model_of(form, auxiliary_loss=True), random_labels([2, 3, 0])
    stock = model(**BATCH, labels=labels).loss_dict
    group, targets, criterion = (
        model(**BATCH, request=GroupRequest()).groups[OWN],
        targets_of(labels),
        model.criterion(),
    )
    losses = criterion.losses(group, targets, criterion.assign(group, targets))
    for layer, suffix in enumerate(("_0", "_1", "")):
        for ours, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
            torch.testing.assert_close(losses[ours][layer] / 5, stock[theirs + suffix], rtol=1e-4, atol=1e-5)
    assert criterion.weights["class"] == 2  # the authors'


def slow_assignment(logits, boxes, labels) -> torch.Tensor:
    """(B, N): the object of each token by minimum cost, -1 for none; every object is of class 0."""
    assignment = torch.full(logits.shape[:2], -1)
    for image, label in enumerate(labels):
        cost = []
        for scores, box in zip(logits[image].tolist(), boxes[image].tolist(), strict=True):
            p = slow_reference.sigmoid(scores[0])
            kind = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
            distances = [sum(abs(a - b) for a, b in zip(box, true, strict=True)) for true in label["boxes"].tolist()]
            overlaps = [slow_reference.scalar_giou(box, true) for true in label["boxes"].tolist()]
            cost.append([kind + 5 * l1 - 2 * giou for l1, giou in zip(distances, overlaps, strict=True)])
        if cost[0]:
            for token, held in zip(*linear_sum_assignment(cost), strict=True):
                assignment[image, token] = held
    return assignment


def test_proposals_are_supervised_as_objects_of_one_class():
    """All tokens, those on padding and at the border too, as the authors have it; Transformers leaves them out."""
    model, labels = model_of(TWO_STAGE).train(), random_labels([2, 3, 0])
    request = GroupRequest(targets=targets_of(labels))
    proposals = model(**BATCH, request=request).supervised["proposals"]
    stock = model.to_stock().train()(**BATCH)
    logits, boxes = stock.enc_outputs_class, stock.enc_outputs_coord_logits.sigmoid()
    assert (stock.enc_outputs_coord_logits == torch.inf).any() and logits.shape[1] == 20 * 20 + 10 * 10 + 5 * 5
    close(proposals.group.logits[0], logits)
    close(proposals.group.boxes[0], boxes)
    criterion = model.criterion()
    losses = criterion.losses(proposals.group, proposals.targets, criterion.assign(proposals.group, proposals.targets))
    one_class = [label | {"class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    expected = slow_reference.detection_loss(logits, boxes, one_class, slow_assignment(logits, boxes, labels), 5)
    for term, value in losses.items():
        assert float(value.detach()) / 5 == pytest.approx(expected[term], rel=1e-4), term


@pytest.mark.parametrize("objects", [[2, 3, 0], [0, 0, 0]], ids=["objects", "no object"])
def test_heads_of_proposals_get_a_gradient(objects):
    model = model_of(TWO_STAGE).train()
    targets = targets_of(random_labels(objects))
    part = model(**BATCH, request=GroupRequest(targets=targets)).supervised["proposals"]
    criterion = model.criterion()
    sum(criterion.losses(part.group, part.targets, criterion.assign(part.group, part.targets)).values()).backward()
    heads = {"class": model.class_embed[-1], "boxes": model.bbox_embed[-1], "selection": model.model.enc_output}
    for name, head in heads.items():
        for parameter in head.parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0 or (name == "boxes" and not any(objects)), name


@pytest.mark.parametrize("teacher", [FAMILY, "rt_detr", "detr"])
@pytest.mark.parametrize("objects", [(3, 0), (0, 0)], ids=["objects", "no object"])
def test_a_step_of_distillation_reaches_every_parameter(family, teacher, objects, tmp_path):
    """Distributed processes wait for the gradient of whatever trains."""
    log, trainer = step(teacher, family, tmp_path, objects)
    assert all(torch.tensor(value).isfinite() for name, value in log.items() if name.startswith("loss"))
    assert not [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    proposals = {name.split("/")[2] for name in log if name.startswith("loss/proposals/")}
    assert proposals == ({"class", "l1", "giou"} if trainer.model.config.two_stage else set())


# queries


def test_new_queries_of_two_stages_are_boxes():
    """Of one stage they get points from the head that makes the model's own."""
    assert model_of(TWO_STAGE).new_queries(9).anchors.shape == (9, 4)
    assert model_of(REFINED).new_queries(9).anchors is None


def test_a_position_that_two_stages_lack_is_made_of_the_boxes():
    model = model_of(TWO_STAGE)
    own = model(**BATCH, request=GroupRequest()).queries
    further = {"content and boxes": Queries(content=own.content, anchors=own.anchors)}
    first, other = model(**BATCH, request=request_for(further, maps=True)).groups.values()
    close(other.logits, first.logits, 1e-4)
    close(other.boxes, first.boxes, 1e-4)
    moved = {"moved": Queries(content=own.content, anchors=own.anchors * 0.8)}
    _, moved = model(**BATCH, request=request_for(moved)).groups.values()
    assert (moved.logits - other.logits).abs().max() > 0.01


def test_one_stage_takes_a_boxs_centre_and_makes_points_where_there_are_none():
    model = model_of(REFINED)
    queries = random_queries(anchor_size=4)
    given = {
        "box": queries,
        "point": Queries(position=queries.position, anchors=queries.anchors[:, :2]),
        "content too": Queries(queries.position, queries.position, queries.anchors),
        "none": Queries(position=queries.position),
    }
    made = model.model.reference_points(queries.position).sigmoid()
    given["made"] = Queries(position=queries.position, anchors=made)
    groups = model(**BATCH, request=request_for(given)).groups
    close(groups["point"].boxes, groups["box"].boxes)
    close(groups["content too"].boxes, groups["box"].boxes)
    close(groups["none"].boxes, groups["made"].boxes)
    assert (groups["none"].boxes - groups["box"].boxes).abs().max() > 0.01


# weights


def ties_of(model) -> set[frozenset[str]]:
    """Names that stand for one and the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def test_ties_are_the_stock_models_wherever_it_goes(form, tmp_path):
    model = model_of(form)
    expected = ties_of(DeformableDetrForObjectDetection(model.config))
    assert expected
    model.save_pretrained(tmp_path)
    kept = copy.deepcopy(model)
    kept.keep_classes(torch.tensor([2, 0]), ["triangle", "circle"])
    for other in (model, copy.deepcopy(model), model.to_stock(), load_detector(str(tmp_path)), kept, kept.to_stock()):
        assert ties_of(other) == expected


def test_class_heads_of_their_own_are_kept(tmp_path):
    """The authors' checkpoint with box refinement has one a layer, where Transformers would tie them."""
    model = model_of(REFINED)
    model.save_pretrained(tmp_path / "tied")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    for layer in (1, 2):
        for leaf in ("weight", "bias"):
            weights[f"class_embed.{layer}.{leaf}"] = weights[f"class_embed.0.{leaf}"] + 0.1 * layer
    save_file(weights, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    loaded = load_detector(str(tmp_path / "tied"))
    before = model(**BATCH, request=GroupRequest()).groups[OWN].logits
    after = loaded(**BATCH, request=GroupRequest()).groups[OWN].logits
    for layer in range(3):
        assert (after - before)[layer].abs().max() >= 0.1 * layer
    assert torch.equal(after[0], before[0])
    loaded.save_pretrained(tmp_path / "again")
    again = DeformableDetrForObjectDetection.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**BATCH).logits, loaded(**BATCH).logits)
    assert torch.equal(loaded.to_stock()(**BATCH).logits, loaded(**BATCH).logits)


def test_classes_that_are_dropped_choose_the_same_proposals():
    """The first of their head's outputs says object or not, whatever the classes are called."""
    model = model_of(TWO_STAGE)
    before = model(**BATCH, request=GroupRequest()).groups[OWN]
    model.keep_classes(torch.tensor([2, 1]), ["triangle", "rectangle"])
    after = model(**BATCH, request=GroupRequest()).groups[OWN]
    close(after.boxes, before.boxes)
    close(after.logits, before.logits[..., [2, 1]])


def test_heads_of_proposals_are_inherited_whichever_layers_are():
    """They follow the decoder's last layer, in a teacher of another depth too."""
    teacher, student = model_of(TWO_STAGE, decoder_layers=4), model_of(TWO_STAGE, decoder_layers=2)
    perturb(teacher)
    _, skipped = inherit(student, teacher, ["heads"], torch.arange(3), [0, 2])
    assert not skipped
    for heads, theirs in ((student.class_embed, teacher.class_embed), (student.bbox_embed, teacher.bbox_embed)):
        for ours, layer in zip(heads, (0, 2, 4), strict=True):
            for value, expected in zip(ours.parameters(), theirs[layer].parameters(), strict=True):
                assert torch.equal(value, expected)


def test_start_values(form):
    torch.manual_seed(0)
    model = D3etrDeformableDetrForObjectDetection(tiny.tiny_config(FAMILY, **(form | {"d_model": 64})))
    for module in (*model.model.encoder.layers, *model.model.decoder.layers):
        attention = module.encoder_attn if hasattr(module, "encoder_attn") else module.self_attn
        assert attention.sampling_offsets.weight.abs().max() == attention.attention_weights.weight.abs().max() == 0
        # the first head's points go right, each one cell further
        points = attention.sampling_offsets.bias.view(4, -1, 4, 2)[0]
        close(points, torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]).expand_as(points))
    layer = model.model.decoder.layers[0]
    assert float(layer.mlp.fc1.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / (64 + 48)), rel=0.02)
    assert float(layer.self_attn.q_proj.weight.detach().abs().max()) == pytest.approx(
        math.sqrt(6 / (64 * 4)), rel=0.02
    )
    assert float(layer.self_attn.o_proj.weight.detach().abs().max()) == pytest.approx(
        math.sqrt(6 / (64 * 2)), rel=0.02
    )
    assert all(torch.all(head.bias == -math.log(99)) for head in model.class_embed)
    two_stage, shared = bool(form.get("two_stage")), not form.get("with_box_refine", True)
    for index, head in enumerate(model.bbox_embed):
        assert head.layers[-1].weight.abs().max() == 0
        sides = -2.0 if not two_stage and (shared or index == 0) else 0.0
        assert head.layers[-1].bias.tolist() == [0, 0, sides, sides]
    assert 0.7 < float(model.model.level_embed.detach().std()) < 1.3
    assert not model.model.input_proj[0][0].bias.any()
    if not two_stage:
        assert 0.9 < float(model.model.query_position_embeddings.weight.detach().std()) < 1.1
        assert not model.model.reference_points.bias.any()


def test_what_a_checkpoint_lacks_of_tied_heads_starts_afresh(tmp_path):
    """Under whatever of its names it is missing."""
    model = model_of(TWO_STAGE)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    saved = [name for name in weights if name.endswith("class_embed.1.bias")]
    assert len(saved) == 1
    save_file({name: value for name, value in weights.items() if name not in saved}, tmp_path / "model.safetensors")
    loaded = D3etrDeformableDetrForObjectDetection.from_pretrained(tmp_path)
    assert torch.all(loaded.class_embed[1].bias == -math.log(99))
    assert torch.equal(loaded.class_embed[0].bias, model.class_embed[0].bias)
    afresh = copy.deepcopy(model)
    afresh.initialise({"class_embed.1.bias"})
    assert torch.all(afresh.model.decoder.class_embed[1].bias == -math.log(99))


def test_an_embedding_of_levels_that_no_encoder_reads_does_not_train():
    model = model_of(REFINED, encoder_layers=0).train()
    output = model(**BATCH, request=GroupRequest()).groups[OWN]
    (output.logits.sum() + output.boxes.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not model.model.level_embed.requires_grad


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 48}, "d_model 48 must be a multiple of 32"),
        ({"encoder_attention_heads": 5}, "d_model 64 must be a multiple of encoder_attention_heads, which is 5"),
        ({"decoder_attention_heads": 0}, "decoder_attention_heads is 0"),
        ({"num_feature_levels": 1}, "num_feature_levels is 1.*out_features give 2 feature maps"),
        ({"decoder_layers": 1}, "decoder_layers is 1"),
        ({"with_box_refine": True, "tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"two_stage": True}, "with_box_refine must be True"),
    ],
)
def test_configurations_that_fail_later_are_refused(changes, message):
    backbone = model_options()["backbone_config"] | {"out_features": ["stage1", "stage2"]}
    options = {"model_type": FAMILY, "backbone_config": backbone, "d_model": 64, "num_feature_levels": 2}
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 4}
    build_model(ModelArguments(model_config=options | sizes), ["a", "b"])
    with pytest.raises(DetectorLoadError, match=f"(?s){message}"):
        build_model(ModelArguments(model_config=options | sizes | changes), ["a", "b"])


def test_a_memory_smaller_than_the_queries_is_refused():
    model, pixels = model_of(TWO_STAGE, num_queries=50), torch.randn(1, 3, 16, 32)
    with pytest.raises(ImageSizeError, match="two_stage_num_proposals is 50.* only 42 tokens"):
        model(pixels, request=GroupRequest())
    model(torch.randn(1, 3, 64, 64), request=GroupRequest())
    model_of(REFINED, num_queries=50)(pixels, request=GroupRequest())


def test_group_pass_leaves_no_hook_behind(form):
    model = perturb(model_of(form))
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    model(**BATCH, request=request_for({AUXILIARY: random_queries(anchor_size=model.anchor_size)}, maps=True))
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == before
