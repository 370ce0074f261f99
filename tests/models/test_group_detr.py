"""Group DETR as RF-DETR and LW-DETR train with it: groups, proposals and losses against the stock class."""

import json
import math

import pytest
import torch

from d3etr_hf.errors import DetectorLoadError, ImageSizeError
from d3etr_hf.models.group_detr import GroupDetrDetector
from d3etr_hf.models.loading import FAMILIES, load_detector
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.objective import D3etrObjective, Shares
from tests.tiny import padded_batch, random_labels, random_queries, request_for, targets_of, tiny_config, tiny_model

GROUP_FAMILIES = [name for name, family in FAMILIES.items() if issubclass(family, GroupDetrDetector)]
BATCH, LABELS = padded_batch(), random_labels([2, 3])
FURTHER = {AUXILIARY: random_queries(5, 32, 9, 4)}
DETECTION_ALONE = Distillation(
    auxiliary_queries="learned", self_attention_weight=0, cross_attention_weight=0, prediction_weight=0
)


@pytest.fixture(params=GROUP_FAMILIES)
def family(request) -> str:
    return request.param


def stock_twin(model):
    """The stock class, built and loaded on its own, with the same weights."""
    twin = type(model).stock_class(type(model.config).from_dict(model.config.to_dict()))
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def terms_of(model, output, labels=LABELS) -> dict[str, torch.Tensor]:
    """Every weighted detection loss of a step of one batch on one process, layer by layer."""
    counted = torch.tensor(float(max(sum(len(label["boxes"]) for label in labels), 1)))
    shares = Shares(torch.tensor(2.0), counted, {OWN: counted, AUXILIARY: counted}, average=lambda tensor: tensor)
    return D3etrObjective(DETECTION_ALONE, model.criterion())(output, None, targets_of(labels), shares)[0]


# the groups


def test_groups_of_training_are_the_stock_classs(family):
    """All of them, layer by layer, and the proposals of each."""
    model = tiny_model(model_type=family).train()
    stock = stock_twin(model)(**BATCH, labels=LABELS)
    output = model(**BATCH, request=GroupRequest())
    assert (
        output.repeats == 3
        and list(output.groups) == [OWN]
        and set(output.supervised)
        == {
            "proposals",
            "further_groups",
        }
    )
    own, further = output.groups[OWN], output.supervised["further_groups"].group
    layers = [*stock.auxiliary_outputs, {"logits": stock.logits, "pred_boxes": stock.pred_boxes}]
    for name, theirs in (("logits", "logits"), ("boxes", "pred_boxes")):
        ours = torch.cat([getattr(own, name)[None], getattr(further, name).unflatten(0, (2, 3))])
        for layer, predictions in enumerate(layers):
            close(ours[:, layer], torch.stack(predictions[theirs].split(7, dim=1)))
    proposals = output.supervised["proposals"].group
    close(proposals.logits, torch.stack(stock.enc_outputs_class.split(7, dim=1)))
    close(proposals.boxes, torch.stack(stock.enc_outputs_coord_logits.split(7, dim=1)))
    assert (ours[0] - ours[1]).abs().max() > 0.01


@pytest.mark.parametrize("maps", [False, True], ids=["no maps", "maps"])
def test_groups_of_training_do_not_see_each_other(family, maps):
    """Nor the auxiliary group, nor it them: it is of another size, which the stock attention could not split."""
    model = tiny_model(model_type=family)
    asleep = model.eval()(**BATCH, request=request_for(FURTHER, maps)).groups
    model.train()
    model.model.backbone.eval()  # batch norm has statistics of its own in training
    both = model(**BATCH, request=request_for(FURTHER, maps))
    alone = model(**BATCH, request=request_for(maps=maps))
    with torch.no_grad():
        model.model.query_feat.weight[7:].normal_()
        model.model.reference_point_embed.weight[7:].normal_(std=0.3)
        for heads in (model.model.enc_output, model.model.enc_out_bbox_embed, model.model.enc_out_class_embed):
            for parameter in heads[1:].parameters():
                parameter.normal_(std=0.3)
    other = model(**BATCH, request=request_for(FURTHER, maps))
    for name in (OWN, AUXILIARY):
        for groups in (both.groups, other.groups, *([alone.groups] if name == OWN else [])):
            close(groups[name].logits, asleep[name].logits)
            close(groups[name].boxes, asleep[name].boxes)
            assert (groups[name].self_attention is not None) == maps
            for ours, theirs in zip(groups[name].self_attention or (), asleep[name].self_attention or (), strict=True):
                close(ours.log, theirs.log, 1e-4)
    further = [output.supervised["further_groups"].group.logits for output in (both, alone, other)]
    close(further[0], further[1])
    assert (further[0] - further[2]).abs().max() > 0.01


def test_eval_mode_runs_one_group(family):
    output = tiny_model(model_type=family)(**BATCH, request=GroupRequest(targets=targets_of(LABELS)))
    assert output.supervised is None and output.repeats is None and output.groups[OWN].logits.shape[2] == 7


def test_places_are_in_the_unpadded_image(family):
    """Against the formula of deformable attention, around boxes of the unpadded image."""
    model, seen = tiny_model(model_type=family), []
    stock = stock_twin(model)
    for layer in stock.model.decoder.layers:
        layer.cross_attn.register_forward_hook(lambda *call: seen.append(call[:1] + call[2:]), with_kwargs=True)
    boxes = stock(**BATCH).init_reference_points
    group = model(**BATCH, request=request_for(maps=True)).groups[OWN]
    assert len(seen) == len(group.cross_attention) == 3
    for (module, arguments, _), attention in zip(seen, group.cross_attention, strict=True):
        states = arguments["hidden_states"] + arguments["position_embeddings"]
        offsets = module.sampling_offsets(states).view(2, 7, 4, -1, 2)
        places = boxes[:, :, None, None, :2] + offsets / 2 * boxes[:, :, None, None, 2:] * 0.5
        close(attention.places, places.transpose(1, 2))
        weights = module.attention_weights(states).view(2, 7, 4, -1).softmax(-1)
        close(attention.weights, weights.transpose(1, 2))


# the loss


def test_losses_of_training_equal_the_stock_loss(family):
    """Every term of every layer, summed over groups, and their weighted total."""
    changes = {"class_loss_coefficient": 1.5, "bbox_loss_coefficient": 4, "giou_loss_coefficient": 3}
    model = tiny_model(model_type=family, **changes).train()
    stock = stock_twin(model)(**BATCH, labels=LABELS)
    terms = terms_of(model, model(**BATCH, request=GroupRequest()))
    names = {"class": ("loss_ce", 1.5), "l1": ("loss_bbox", 4), "giou": ("loss_giou", 3)}
    for name, (theirs, weight) in names.items():
        layers = terms[f"student/{name}"] + terms[f"further_groups/{name}"].unflatten(0, (2, 3)).sum(0)
        for layer, suffix in enumerate(("_0", "_1", "")):
            torch.testing.assert_close(layers[layer], weight * stock.loss_dict[theirs + suffix], rtol=1e-4, atol=1e-6)
        proposals = terms[f"proposals/{name}"].sum()
        torch.testing.assert_close(proposals, weight * stock.loss_dict[f"{theirs}_enc"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(term.sum() for term in terms.values()), stock.loss, rtol=1e-4, atol=1e-5)


def test_the_auxiliary_groups_loss_is_divided_by_the_objects_once(family):
    """It stands for one group of the student beside the teacher, whatever else trains."""
    model = tiny_model(model_type=family).train()
    output = model(**BATCH, request=request_for(FURTHER))
    terms, criterion, group = terms_of(model, output), model.criterion(), output.groups[AUXILIARY]
    losses = criterion.losses(group, targets_of(LABELS), criterion.assign(group, targets_of(LABELS)))
    for name, value in losses.items():
        torch.testing.assert_close(terms[f"{AUXILIARY}/{name}"], criterion.weights[name] * value / 5)


@pytest.mark.parametrize("counts", [[0, 0], [0, 9]], ids=["no object", "more than queries"])
def test_what_trains_gets_a_gradient_of_the_loss(family, counts):
    model, labels = tiny_model(model_type=family).train(), random_labels(counts)
    loss = sum(term.sum() for term in terms_of(model, model(**BATCH, request=GroupRequest()), labels).values())
    loss.backward()
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in trains.values())


# start and settings


def test_start_values(family):
    """Boxes are the proposals to begin with, and these where tokens are; each group's heads start as copies."""
    torch.manual_seed(0)
    model = FAMILIES[family](tiny_config(family, num_queries=50, d_model=64)).train()
    output = model(**padded_batch(size=128), request=GroupRequest())
    boxes = output.groups[OWN].boxes
    assert torch.equal(boxes[0], output.queries.anchors) and torch.equal(boxes[0], boxes[2])
    assert torch.equal(boxes[0], output.supervised["proposals"].group.boxes[0])
    assert float(boxes[..., 2].detach().max()) in (pytest.approx(0.05), pytest.approx(0.1))
    assert 0.9 < float(model.model.query_feat.weight.detach().std()) < 1.1
    assert torch.all(model.class_embed.bias == -math.log(99))
    for group in range(3):
        assert torch.equal(model.model.enc_out_class_embed[group].weight, model.class_embed.weight)
        assert torch.equal(model.model.enc_out_bbox_embed[group].layers[0].bias, model.bbox_embed.layers[0].bias)
    assert not torch.equal(model.model.enc_output[0].weight, model.model.enc_output[1].weight)
    layer = model.model.decoder.layers[0]
    bounds = {
        model.model.enc_output[0]: math.sqrt(6 / 128),
        layer.mlp.fc1: math.sqrt(6 / (64 + 48)),
        layer.self_attn.q_proj: math.sqrt(6 / (64 + 3 * 64)),
        layer.self_attn.o_proj: math.sqrt(6 / 128),
    }
    for module, bound in bounds.items():
        assert float(module.weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
    assert layer.self_attn.q_proj.bias.abs().max() == layer.self_attn.o_proj.bias.abs().max() == 0
    assert layer.cross_attn.sampling_offsets.weight.abs().max() == 0 < layer.cross_attn.sampling_offsets.bias.std()


@pytest.mark.parametrize("options", [{"group_detr": 0}, {"d_model": 30}, {"num_queries": 0}])
def test_a_configuration_that_would_fail_later_is_refused(family, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} (is )?{next(iter(options.values()))}"):
        FAMILIES[family].check_config(tiny_config(family, **options))


def test_an_image_that_does_not_fit_is_refused(family):
    model = tiny_model(model_type=family)
    with pytest.raises(ImageSizeError, match=r"60 x 60 pixels.*multiples of 16"):
        model(torch.zeros(1, 3, 60, 60), request=GroupRequest())
    model = tiny_model(model_type=family, num_queries=90)
    with pytest.raises(ImageSizeError, match=r"num_queries is 90, but .* 32 x 32 pixels has only (16|80) tokens"):
        model(torch.zeros(1, 3, 32, 32), request=GroupRequest())


@pytest.mark.parametrize("changes", [{"group_detr": 2}, {"num_queries": 9}])
def test_a_checkpoint_of_other_groups_than_its_configuration_is_refused(family, changes, tmp_path):
    tiny_model(model_type=family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DetectorLoadError, match="tensors are of another shape than config.json says"):
        load_detector(str(tmp_path))
