"""The model against the stock class, on perturbed weights: at initialisation most faults do not show."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, ConditionalDetrForObjectDetection, SwinConfig
from transformers.models.conditional_detr.modeling_conditional_detr import inverse_sigmoid

from d3etr_hf.models import D3etrConditionalDetrForObjectDetection, conditional_detr
from d3etr_hf.models.query_adapters import LearnedQueries, QueryAdapter
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest, Queries
from tests.tiny import padded_batch, perturb, random_labels, random_queries, request_for, tiny_config, tiny_model

PLAIN, MAPS = request_for(), request_for(maps=True)


def stock_twin(model, attention="sdpa") -> ConditionalDetrForObjectDetection:
    """The stock class, built and loaded on its own, with the same weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = {"": attention, "backbone_config": "eager"}
    twin = ConditionalDetrForObjectDetection(config).eval()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("query_adapters")}
    twin.load_state_dict(own)
    return twin


def with_auxiliary_group(maps=False, width=32, points=None) -> GroupRequest:
    return request_for({AUXILIARY: Queries(position=random_queries(width=width).position, anchors=points)}, maps)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("request_", [PLAIN, MAPS], ids=["no maps", "maps"])
def test_group_pass_equals_stock_forward(auxiliary_loss, request_):
    """HF_NOTES 1: `auxiliary_loss` changes what the stock class computes; a checkpoint keeps its semantics."""
    model, batch = tiny_model(auxiliary_loss=auxiliary_loss), padded_batch()
    stock = stock_twin(model)(**batch)
    group = model(**batch, request=request_).groups[OWN]
    close(group.logits[-1], stock.logits)
    close(group.boxes[-1], stock.pred_boxes)
    own = model(**batch)
    assert torch.equal(own.logits, stock.logits) and torch.equal(own.pred_boxes, stock.pred_boxes)


def test_layer_predictions_are_normed_once_on_the_side():
    """HF_NOTES 1: predictions of earlier layers come from raw outputs, each through the norm once."""
    model, batch = tiny_model(), padded_batch()
    twin = stock_twin(model)
    outputs = twin.model(**batch, output_hidden_states=True)
    raw = outputs.decoder_hidden_states
    hidden = torch.stack([twin.model.decoder.layernorm(h) for h in raw[1:-1]] + [raw[-1]])
    boxes = twin.bbox_predictor(hidden)
    boxes[..., :2] += inverse_sigmoid(outputs.reference_points).transpose(0, 1)
    group = model(**batch, request=PLAIN).groups[OWN]
    close(group.logits, twin.class_labels_classifier(hidden))
    close(group.boxes, boxes.sigmoid())
    assert (group.logits[0] - group.logits[-1]).abs().max() > 0.01  # the layers do differ


def test_layer_predictions_with_auxiliary_loss_equal_stock_ones():
    model, batch = tiny_model(auxiliary_loss=True), padded_batch()
    stock = stock_twin(model)(**batch, labels=random_labels([2, 1]))
    group = model(**batch, request=PLAIN).groups[OWN]
    for layer, outputs in enumerate(stock.auxiliary_outputs):
        close(group.logits[layer], outputs["logits"])
        close(group.boxes[layer], outputs["pred_boxes"])


@pytest.mark.parametrize("maps", [False, True])
def test_group_isolation(maps):
    """The student's outputs are what they are without the auxiliary group (HF_NOTES 5: a boolean mask leaks)."""
    batch = padded_batch()
    alone = tiny_model()(**batch, request=request_for(maps=maps)).groups[OWN]
    both = tiny_model()(**batch, request=with_auxiliary_group(maps)).groups
    assert list(both) == [OWN, AUXILIARY] and both[AUXILIARY].logits.shape[2] == 5
    close(both[OWN].logits, alone.logits)
    close(both[OWN].boxes, alone.boxes)
    assert (alone.self_attention is not None) == maps
    for ours, without in zip(both[OWN].self_attention or (), alone.self_attention or (), strict=True):
        close(ours.log, without.log)


def test_auxiliary_group_does_not_see_the_student_group():
    """Isolation the other way round: other student queries leave the auxiliary group as it is."""
    model, batch = tiny_model(), padded_batch()
    before = model(**batch, request=with_auxiliary_group()).groups
    with torch.no_grad():
        model.model.query_position_embeddings.weight.normal_()
    after = model(**batch, request=with_auxiliary_group()).groups
    close(after[AUXILIARY].logits, before[AUXILIARY].logits)
    assert (after[OWN].logits - before[OWN].logits).abs().max() > 0.01


def test_auxiliary_group_with_own_queries_equals_own_group():
    """The auxiliary group is decoded as the student group is: fed the same queries it gives the same."""
    model, batch = tiny_model(), padded_batch()
    queries = model.model.query_position_embeddings.weight
    points = model.model.decoder.ref_point_head(queries).sigmoid()
    further = {"again": Queries(position=queries), "content": Queries(content=queries)}
    further["with points"] = Queries(position=queries, anchors=points)
    own, *others = model(**batch, request=request_for(further, maps=True)).groups.values()
    assert len(others) == 3
    for other in others:
        close(other.logits, own.logits)
        close(other.boxes, own.boxes)
        close(other.cross_attention[1].probability, own.cross_attention[1].probability)


def test_given_reference_points_are_used():
    points = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    batch = padded_batch()
    literal = tiny_model()(**batch, request=with_auxiliary_group()).groups[AUXILIARY]
    given = tiny_model()(**batch, request=with_auxiliary_group(points=points)).groups[AUXILIARY]
    assert (literal.boxes - given.boxes).abs().max() > 0.05
    # of another family's boxes the centres serve
    boxes = torch.cat([points, torch.full_like(points, 0.2)], dim=-1)
    close(tiny_model()(**batch, request=with_auxiliary_group(points=boxes)).groups[AUXILIARY].boxes, given.boxes)


def test_maps_equal_stock_eager_maps():
    """HF_NOTES 4: under sdpa the stock class returns none; and no mass may fall on padding."""
    model, batch = tiny_model(), padded_batch(3)
    stock = stock_twin(model, attention="eager")(**batch, output_attentions=True)
    output = model(**batch, request=MAPS)
    group, padding = output.groups[OWN], ~output.memory_mask.flatten(1)
    assert padding.any()
    for layer in range(3):
        close(group.self_attention[layer].probability, stock.decoder_attentions[layer])
        log, cross = group.cross_attention[layer]
        assert log.isfinite().all()
        close(log.exp(), cross)
        close(cross, stock.cross_attentions[layer])
        close(cross.sum(-1), torch.ones_like(cross.sum(-1)))
        assert cross.masked_select(padding[:, None, None]).max() == 0


def test_maps_are_taken_before_dropout():
    """HF_NOTES 4: dropout zeroes attention weights, and log 0 follows."""
    model, batch = tiny_model(attention_dropout=0.5), padded_batch()
    still = model(**batch, request=MAPS).groups[OWN]
    model.train()
    dropped = model(**batch, request=MAPS).groups[OWN]
    close(
        dropped.self_attention[0].probability, still.self_attention[0].probability
    )  # the first layer: nothing dropped before it
    assert dropped.self_attention[2].log.isfinite().all()
    assert (dropped.logits - still.logits).abs().max() > 0.01  # dropout does act on the values


def test_only_what_is_asked_for_is_materialised():
    model, batch = tiny_model(), padded_batch()
    assert model(**batch, request=PLAIN).groups[OWN].self_attention is None
    group = model(**batch, request=GroupRequest(cross_attention=True)).groups[OWN]
    assert group.self_attention is None and len(group.cross_attention) == 3
    assert model.model.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_stock_attention_outputs_still_work():
    model, batch = tiny_model(), padded_batch()
    model.set_attn_implementation("eager")
    assert len(model(**batch, output_attentions=True).cross_attentions) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_carry_gradient(checkpointing):
    """HF_NOTES 4: also under gradient checkpointing, where it must be the same gradient."""

    def gradients(checkpointed):
        model = tiny_model().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        groups = model(**padded_batch(), request=with_auxiliary_group(maps=True)).groups.values()
        sum(m.log[..., 0].sum() for g in groups for m in (*g.self_attention, *g.cross_attention)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, other = gradients(False), gradients(checkpointing)
    assert plain.keys() == other.keys()
    layer = "model.decoder.layers.2.self_attn.q_content_proj.weight"
    assert plain[layer].abs().sum() > 0
    for name, gradient in plain.items():
        close(other[name], gradient)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny_model().activation_checkpointing_enable({"use_reentrant": True})


def test_teacher_queries_get_no_gradient_and_learned_ones_do():
    fixed, request = tiny_model(), with_auxiliary_group()
    fixed.query_adapters[AUXILIARY] = QueryAdapter(32, 32)
    fixed(**padded_batch(), request=request).groups[AUXILIARY].logits.sum().backward()
    assert not request.queries[AUXILIARY].position.requires_grad
    assert not any(name.startswith("query_adapters") for name, _ in fixed.named_parameters())
    learned = tiny_model()
    learned.query_adapters[AUXILIARY] = LearnedQueries(random_queries())
    learned(**padded_batch(), request=request_for({AUXILIARY: None})).groups[AUXILIARY].logits.sum().backward()
    assert learned.query_adapters[AUXILIARY].position.grad.abs().sum() > 0
    assert learned.query_adapters[AUXILIARY].content is None


@pytest.mark.parametrize("width", [16, 48])
def test_queries_of_another_width_are_carried_over_with_their_spread(width):
    anchors = torch.rand(2000, 4)
    queries = Queries(torch.randn(2, 2000, width), torch.randn(2000, width), anchors)
    carried = QueryAdapter(width, 32)(queries).detach()
    assert carried.position.shape == (2000, 32) and carried.content.shape == (2, 2000, 32)
    assert 0.8 < float(carried.position.std()) < 1.2 and 0.8 < float(carried.content.std()) < 1.2
    assert carried.anchors is anchors or torch.equal(carried.anchors, anchors)
    same = QueryAdapter(width, width)(queries)
    assert torch.equal(same.position, queries.position) and torch.equal(same.content, queries.content)


def test_saved_checkpoint_is_a_plain_stock_model(tmp_path):
    """HF_NOTES 7: right architecture, no auxiliary group, no projection, nothing of ours."""
    model, batch = tiny_model(), padded_batch()
    model.query_adapters[AUXILIARY] = QueryAdapter(16, 32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ConditionalDetrForObjectDetection"]
    twin = stock_twin(model)
    twin.save_pretrained(tmp_path / "twin")
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "twin" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is ConditionalDetrForObjectDetection
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_stock_checkpoint_loads(tmp_path):
    twin = perturb(ConditionalDetrForObjectDetection(tiny_config()).eval())
    twin.save_pretrained(tmp_path)
    model, batch = D3etrConditionalDetrForObjectDetection.from_pretrained(tmp_path), padded_batch()
    assert torch.equal(model(**batch).logits, twin(**batch).logits)
    close(model(**batch, request=PLAIN).groups[OWN].logits[-1], twin(**batch).logits)


def test_half_precision_checkpoint_loads_in_float32(tmp_path):
    """HF_NOTES 8: `from_pretrained` keeps the checkpoint's dtype unless told otherwise."""
    tiny_model().half().save_pretrained(tmp_path)
    assert D3etrConditionalDetrForObjectDetection.from_pretrained(tmp_path).dtype == torch.float32
    half = D3etrConditionalDetrForObjectDetection.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.dtype == torch.float16


def test_stock_loss_is_found():
    """HF_NOTES 6: the loss function is looked up by the class's name."""
    model, batch, labels = tiny_model(), padded_batch(), random_labels([2, 1])
    close(model(**batch, labels=labels).loss, stock_twin(model)(**batch, labels=labels).loss)


def test_backbone_with_attention_of_its_own(tmp_path):
    """Our attention must not be set in the backbone; buffers that no state dict holds must be saved right."""
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, out_features=["stage2"]
    )
    model, batch = tiny_model(backbone_config=backbone), padded_batch()
    stock = stock_twin(model)(**batch)
    close(model(**batch).logits, stock.logits)
    close(model(**batch, request=MAPS).groups[OWN].logits[-1], stock.logits)
    close(model.to_stock()(**batch).logits, stock.logits)
    model.save_pretrained(tmp_path)
    close(ConditionalDetrForObjectDetection.from_pretrained(tmp_path)(**batch).logits, stock.logits)


def test_recomputed_maps_are_not_collected_again(monkeypatch):
    """Under activation checkpointing every layer runs twice; the second maps would only cost memory."""
    model = tiny_model().train()
    model.activation_checkpointing_enable()
    seen, original = [], conditional_detr.start_groups
    monkeypatch.setattr(
        conditional_detr, "start_groups", lambda *arguments: seen.append(original(*arguments)) or seen[-1]
    )
    model(**padded_batch(), request=MAPS).groups[OWN].logits.sum().backward()
    (groups,) = seen
    assert len(groups.self_maps) == len(groups.cross_maps) == 3
