"""What every family in `FAMILIES` must do: the promises of `Detector`, on perturbed tiny models.

A toy detector, which shares no attribute with any of them, stands beside them wherever a promise is its own.
"""

import inspect
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForObjectDetection, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from d3etr_hf.models.detector import ADAPTERS, DECODER, ENCODER, HEADS, QUERIES, ROLES, inherit
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import FAMILIES, load_detector
from d3etr_hf.models.query_adapters import LearnedQueries, QueryAdapter
from d3etr_hf.outputs import AUXILIARY, NO_OBJECT, OWN, AttentionMap, GroupRequest, Queries, SoftmaxScores
from tests import slow_reference
from tests.tiny import (
    TINY_CONFIGS,
    normalisers_of,
    padded_batch,
    perturb,
    random_labels,
    random_queries,
    request_for,
    small_image_processor,
    targets_of,
    tiny_config,
    tiny_model,
)
from tests.toy_detector import ToyConfig, ToyDetector, ToyForObjectDetection, toy_model

BATCH = padded_batch()


TOY = "toy_detector"
# families whose stock loss is a dictionary of weighted terms, and what it calls its class term
WEIGHTED_TERMS = {"d_fine": "loss_vfl", "deimv2": "loss_mal", "rt_detr": "loss_vfl", "rt_detr_v2": "loss_vfl"}
# what a stock model of a single layer needs: Transformers would tie its heads to those of others
CUT = dict.fromkeys(("d_fine", "deformable_detr", "deimv2", "rt_detr_v2"), {"tie_word_embeddings": False})
# under what the stock loss of eval mode is compared: it would split one group's queries into those of training; and
# assignments are each layer's own
COMPARED = {"deimv2": {"use_dense_one_to_one": False}, "lw_detr": {"group_detr": 1}, "rf_detr": {"group_detr": 1}}
# no setting of a loss as anywhere else
SETTINGS = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "lw_detr", "rf_detr"), {"focal_alpha": 0.4}),
    **dict.fromkeys(
        WEIGHTED_TERMS,
        {"matcher_alpha": 0.3, "matcher_gamma": 1.5, "focal_loss_alpha": 0.6, "focal_loss_gamma": 1.8},
    ),
    **dict.fromkeys(("detr", "table-transformer"), {"eos_coefficient": 0.3}),
}
# what the toy's configuration calls these
TOY_NAMES = {"decoder_layers": "rounds", "num_queries": "slots"}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(params=[*FAMILIES, TOY])
def any_family(request, monkeypatch) -> str:
    if request.param == TOY:
        monkeypatch.setitem(FAMILIES, TOY, ToyDetector)
        AutoConfig.register(TOY, ToyConfig, exist_ok=True)
        AutoModelForObjectDetection.register(ToyConfig, ToyForObjectDetection, exist_ok=True)
    return request.param


def model_of(family: str, seed: int = 0, **changes):
    """A perturbed tiny detector of three layers and seven queries, the toy among them; in eval mode."""
    if family != TOY:
        return tiny_model(seed, family, **changes)
    return perturb(toy_model(seed, **({"rounds": 3, "slots": 7} | named_for(family, changes)))).eval()


def named_for(family: str, changes: dict) -> dict:
    """Changes of a configuration, as this family calls them."""
    return {TOY_NAMES[name]: value for name, value in changes.items()} if family == TOY else changes


def test_there_is_a_tiny_configuration_of_every_family():
    assert set(TINY_CONFIGS) == set(FAMILIES)
    assert all(tiny_config(name).model_type == name for name in FAMILIES)


def stock_twin(model, **changes):
    """The stock class, built and loaded on its own, with the same weights as far as it has them."""
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    twin = type(model).stock_class(config).eval()
    info = twin.load_state_dict(model.state_dict(), strict=False)
    assert not info.missing_keys
    return twin


def further_queries(model, seed: int = 9) -> dict[str, Queries]:
    """Another model's queries as the trainer hands them over."""
    return {AUXILIARY: random_queries(5, model.width, seed, model.anchor_size)}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def values_of(attention) -> tuple[torch.Tensor, ...]:
    """What can be compared within a tolerance: probabilities, or places and weights."""
    return (attention.probability,) if isinstance(attention, AttentionMap) else tuple(attention)


# one forward pass


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("maps", [False, True], ids=["no maps", "maps"])
def test_own_group_equals_stock_forward(any_family, training, maps):
    equals_stock_forward(model_of(any_family), training, maps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("maps", [False, True], ids=["no maps", "maps"])
def test_own_group_equals_stock_forward_with_auxiliary_loss(family, training, maps):
    equals_stock_forward(tiny_model(model_type=family, auxiliary_loss=True), training, maps)


def own_of(predictions: torch.Tensor, model) -> torch.Tensor:
    """The stock class's predictions for the model's own group, of all that Group DETR trains the first."""
    return predictions[:, : model.query_count]


def equals_stock_forward(model, training: bool, maps: bool) -> None:
    model.train(training)
    stock = stock_twin(model).train(training)(**BATCH)
    output = model(**BATCH, request=request_for(maps=maps))
    assert stock.logits.shape[1] == model.query_count * (output.repeats or 1)
    close(output.groups[OWN].logits[-1], own_of(stock.logits, model))
    close(output.groups[OWN].boxes[-1], own_of(stock.pred_boxes, model))
    own = model(**BATCH)
    assert torch.equal(own.logits, stock.logits) and torch.equal(own.pred_boxes, stock.pred_boxes)


def test_own_group_equals_stock_forward_without_a_mask(any_family):
    model, pixels = model_of(any_family), BATCH["pixel_values"]
    stock = stock_twin(model)(pixels)
    close(model(pixels, request=GroupRequest()).groups[OWN].logits[-1], stock.logits)


def test_dropout_falls_where_it_falls_in_the_stock_class(family):
    model = tiny_model(model_type=family, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3).train()
    stock = stock_twin(model).train()
    found = []
    of_stock, of_group = lambda: stock(**BATCH).logits, lambda: model(**BATCH, request=GroupRequest()).groups[OWN]
    for forward in (lambda: own_of(of_stock(), model), lambda: of_group().logits[-1]):
        torch.manual_seed(5)
        found.append(forward())
    close(*found)
    assert (found[0] - model.eval()(**BATCH).logits).abs().max() > 0.01


def test_every_layer_equals_a_stock_model_that_ends_there(any_family):
    model = model_of(any_family)
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    assert len(group.logits) == len(group.boxes) == model.decoder_depth == 3
    for layer in range(3):
        changes = named_for(any_family, {"decoder_layers": layer + 1}) | CUT.get(any_family, {})
        stock = stock_twin(model, **changes)(**BATCH)
        close(group.logits[layer], stock.logits)
        close(group.boxes[layer], stock.pred_boxes)
    assert (group.boxes[0] - group.boxes[1]).abs().max() > 1e-3


@pytest.mark.parametrize("maps", [False, True], ids=["no maps", "maps"])
def test_groups_do_not_see_each_other(any_family, maps):
    """Neither way, in any layer, predictions and maps alike."""
    model = model_of(any_family)
    alone = model(**BATCH, request=request_for(maps=maps)).groups
    both = model(**BATCH, request=request_for(further_queries(model), maps)).groups
    assert list(alone) == [OWN] and list(both) == [OWN, AUXILIARY]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.role_of(name) == QUERIES:
                parameter.normal_(std=0.3)  # with 1 what a family makes proposals of would grow beyond all numbers
    others = model(**BATCH, request=request_for(further_queries(model), maps)).groups
    assert (others[OWN].logits - both[OWN].logits).abs().max() > 0.01
    for first, second in ((alone[OWN], both[OWN]), (both[AUXILIARY], others[AUXILIARY])):
        close(first.logits, second.logits)
        close(first.boxes, second.boxes)
        for kind in ("self_attention", "cross_attention"):
            ours, theirs = getattr(first, kind), getattr(second, kind)
            assert (ours is not None) == (theirs is not None) == maps
            for layer, other in zip(ours or (), theirs or (), strict=True):
                for part, another in zip(values_of(layer), values_of(other), strict=True):
                    close(part, another)


def test_own_queries_in_another_group_give_the_same(any_family):
    """As one image's worth, as one batch's, and where only the content is known under another name."""
    model = model_of(any_family)
    own = model(**BATCH, request=GroupRequest()).queries
    assert len(own) == model.query_count == 7

    def of_batch(part):
        return None if part is None else part.expand(2, -1, -1)

    groups = {"again": own, "of each image": Queries(*map(of_batch, (own.content, own.position, own.anchors)))}
    if model.makes_anchors or own.anchors is None:
        groups["without anchors"] = Queries(own.content, own.position)
    first, *others = model(**BATCH, request=request_for(groups, maps=True)).groups.values()
    assert len(others) == len(groups) >= 2
    for other in others:
        close(other.logits, first.logits)
        close(other.boxes, first.boxes)


def test_maps_are_distributions_over_the_image(any_family):
    model = model_of(any_family)
    output = model(**padded_batch(3), request=request_for(further_queries(model), maps=True))
    assert output.memory_mask.dtype == torch.bool and output.memory_mask.shape[0] == 3
    padding = ~output.memory_mask.flatten(1)
    assert bool(padding.any()) == model.reads_padding and not padding.all(1).any()
    for group, queries in ((output.groups[OWN], 7), (output.groups[AUXILIARY], 5)):
        assert len(group.self_attention) == len(group.cross_attention) == 3
        for attention in group.self_attention:
            assert attention.probability.shape[2:] == (queries, queries)
        grids = [m if isinstance(m, AttentionMap) else m.on_grid(output.memory_mask) for m in group.cross_attention]
        for attention in grids:
            assert attention.probability.shape[0] == 3
            assert attention.probability.shape[2:] == (queries, output.memory_mask[0].numel())
            assert attention.probability.masked_fill(~padding[:, None, None], 0).max() == 0
        for attention in (*group.self_attention, *grids):
            assert attention.log.dtype == attention.probability.dtype == torch.float32
            assert attention.log.isfinite().all()
            close(attention.log.exp(), attention.probability)
            close(attention.probability.sum(-1), torch.ones_like(attention.probability[..., 0]))
        assert (group.cross_attention[0][-1] - group.cross_attention[1][-1]).abs().max() > 1e-4


@pytest.mark.parametrize("asked", ["self_attention", "cross_attention"])
def test_only_what_is_asked_for_is_returned(any_family, asked):
    group = model_of(any_family)(**BATCH, request=GroupRequest(**{asked: True})).groups[OWN]
    given = {name for name in ("self_attention", "cross_attention") if getattr(group, name) is not None}
    assert given == {asked}


def test_predictions_leave_autocast_in_full_precision(any_family):
    """In bfloat16 a small object's box would be off by a tenth of its size."""
    model = model_of(any_family)
    exact = model(**BATCH, request=request_for(further_queries(model), maps=True)).groups
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**BATCH, request=request_for(further_queries(model), maps=True))
    assert all(part is None or part.dtype == torch.float32 for part in vars(output.queries).values())
    for name, group in output.groups.items():
        for kind in ("logits", "boxes"):
            values = getattr(group, kind)
            assert values.dtype == torch.float32
            rounded = (values == values.bfloat16().float()).float().mean()
            assert rounded < 0.1, f"{name}'s {kind} were computed in bfloat16"
            if model.static_queries() is not None or name == AUXILIARY:  # else rounded scores choose other queries
                close(values, getattr(exact[name], kind), 0.2)
        for attention in (*group.self_attention, *group.cross_attention):
            assert all(part.dtype == torch.float32 for part in attention)
            total = attention[-1].sum(-1)  # probabilities, or weights of places
            close(total, torch.ones_like(total), 1e-4)


def test_predictions_of_a_model_in_half_precision_are_wide(family):
    """As evaluation under `--bf16_full_eval` runs it."""
    model, pixels = tiny_model(model_type=family).bfloat16(), BATCH["pixel_values"].bfloat16()
    request = request_for(further_queries(model), maps=True)
    queries = {
        name: Queries(*(part if part is None else part.bfloat16() for part in vars(group).values()))
        for name, group in request.queries.items()
    }
    for group in model(pixels, BATCH["pixel_mask"], request=request._replace(queries=queries)).groups.values():
        assert group.logits.dtype == group.boxes.dtype == torch.float32
        for attention in (*group.self_attention, *group.cross_attention):
            assert all(part.dtype == torch.float32 for part in attention)


def test_memory_and_hidden_states_are_the_stock_decoders(family):
    """On request alone, whatever further groups there are; padding is where it is in the image."""
    model = tiny_model(model_type=family)
    twin, given = stock_twin(model), {}
    twin.model.decoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    stock = twin(**BATCH)
    request = request_for(further_queries(model))._replace(memory=True, hidden_states=True)
    output = model(**BATCH, request=request)
    assert len(output.memory) == model.memory_levels
    tokens = torch.cat([level.features.flatten(2).mT for level in output.memory], dim=1)
    close(tokens, given["encoder_hidden_states"])
    for level in output.memory:
        height, width = level.mask.shape[1:]
        assert level.features.shape == (2, model.width, height, width)
        assert level.mask[0].all() and level.mask[1].all() != model.reads_padding
    assert any(torch.equal(level.mask, output.memory_mask) for level in output.memory)
    close(output.groups[OWN].hidden_states, stock.last_hidden_state)
    assert output.groups[AUXILIARY].hidden_states.shape == (2, 5, model.width)
    unasked = model(**BATCH, request=request_for())
    assert unasked.memory is None and unasked.groups[OWN].hidden_states is None


# gradient


def test_gradient_reaches_own_queries_and_none_that_were_detached(any_family):
    model = model_of(any_family).train()
    given = further_queries(model)[AUXILIARY]
    leaves = [part.requires_grad_() for part in (given.position, given.anchors) if part is not None]
    for request in (request_for({AUXILIARY: given.detach()}), request_for({AUXILIARY: given})):
        model(**BATCH, request=request).groups[AUXILIARY].boxes.sum().backward()
        reached = [leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in leaves]
        assert all(reached) if request.queries[AUXILIARY] is given else not any(reached)
    if model.static_queries() is None:
        return  # made of the image: what makes them, ground truth supervises
    model.zero_grad()
    model(**BATCH, request=GroupRequest()).groups[OWN].boxes.sum().backward()
    for name, parameter in model.named_parameters():
        if model.role_of(name) == QUERIES:
            assert parameter.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradient_of_maps_and_predictions(family):
    """And runs decoder layers a second time: without that no memory is saved."""
    if not FAMILIES[family].supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support activation checkpointing"):
            tiny_model(model_type=family).activation_checkpointing_enable()
        return
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(model_type=family).train()
        calls.append([])
        for name, module in model.named_modules():
            if model.role_of(f"{name}.") == DECODER and isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_, called=calls[-1], name=name: called.append(name))
        if checkpointing:
            model.activation_checkpointing_enable()
        output = model(**BATCH, request=request_for(further_queries(model), maps=True))
        loss = 0
        for group in output.groups.values():
            loss = loss + group.logits.square().sum() + group.boxes.sum()
            maps = (*group.self_attention, *group.cross_attention)
            loss = loss + sum(part[..., 0].square().sum() for attention in maps for part in attention[-1:])
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-4)
    assert len(calls[1]) > 1.5 * len(calls[0]) > 0
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny_model(model_type=family).activation_checkpointing_enable({"use_reentrant": True})


def test_what_trains_gets_a_gradient_and_what_loads_trains_the_same(any_family, tmp_path):
    """Distributed training waits for the gradient of whatever trains; what could learn and is frozen is known."""
    model = model_of(any_family).train()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    output = model(**BATCH, request=GroupRequest())
    groups = [output.groups[OWN], *(part.group for part in (output.supervised or {}).values())]
    sum(group.logits.sum() + group.boxes.sum() for group in groups).backward()
    assert not {name for name in trains if model.get_parameter(name).grad is None}
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns - trains <= {"model.decoder.reg_scale", "model.decoder.up"}  # how far D-FINE's bins reach
    model.requires_grad_(False)
    model.freeze()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trains
    for role in ROLES:
        model.freeze_part(role)
        left = {name for name, p in model.named_parameters() if p.requires_grad}
        trains -= {name for name in trains if model.role_of(name) == role}
        assert left == trains
    assert not trains


def test_every_parameter_plays_one_role(any_family):
    model = model_of(any_family)
    assert set(model.parts) == set(ROLES)
    seen = set()
    for name, _ in model.named_parameters():
        roles = [role for role, prefixes in model.parts.items() if name.startswith(prefixes)]
        assert roles == [model.role_of(name)], name
        seen |= set(roles)
    assert seen == set(ROLES)
    model.query_adapters[AUXILIARY] = LearnedQueries(model.new_queries(4))
    adapters = [name for name, _ in model.named_parameters() if name.startswith(ADAPTERS)]
    assert adapters and all(model.role_of(name) is None for name in adapters)


def test_learned_position_embeddings_of_a_memory_are_the_encoders():
    """Where a family can have them."""
    for name in FAMILIES:
        if "position_embedding_type" in tiny_config(name).to_dict():
            model = tiny_model(model_type=name, position_embedding_type="learned")
            found = [model.role_of(each) for each, _ in model.named_parameters() if ".row_embeddings." in each]
            assert found == [ENCODER], name
            equals_stock_forward(model, training=False, maps=False)


def test_what_ground_truth_alone_supervises(any_family):
    """As the criterion takes it: predictions of layers of its own, in full precision, under a name of their own."""
    model = model_of(any_family).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**BATCH, request=request_for(further_queries(model)))
    criterion, targets = model.criterion(), targets_of(random_labels([2, 3]))
    assert bool(output.supervised) == (model.static_queries() is None)
    for name, part in (output.supervised or {}).items():
        group = part.group
        assert name not in output.groups and part.assignment is None
        assert group.logits.dtype == group.boxes.dtype == torch.float32
        assert group.logits.shape[:3] == group.boxes.shape[:3] and group.boxes.shape[1] == 2
        assert 0 <= group.boxes.min() and group.boxes.max() <= 1
        assert criterion.scores.classes(group.logits) == 3
        losses = criterion.losses(group, targets, criterion.assign(group, targets))
        assert all(value.shape == group.boxes.shape[:1] and value.isfinite().all() for value in losses.values())


# queries


def test_static_queries_are_those_of_a_forward_pass(any_family):
    model = model_of(any_family)
    static, of_batch = model.static_queries(), model(**BATCH, request=GroupRequest()).queries
    assert (of_batch.anchors is None) == (model.anchor_size == 0)
    if of_batch.anchors is not None:
        assert of_batch.anchors.shape[-1] == model.anchor_size
        assert of_batch.anchors.min() >= 0 and of_batch.anchors.max() <= 1
    if static is None:
        own = [part for part in (of_batch.content, of_batch.position, of_batch.anchors) if part is not None]
        assert any(part.dim() == 3 and not torch.equal(part[0], part[1]) for part in own)
        return
    for part, other in zip(vars(static).values(), vars(of_batch).values(), strict=True):
        assert (part is None) == (other is None)
        if part is not None:
            close(part, other)
    with torch.autocast("cpu", torch.bfloat16):  # the teacher's are read within a training step
        assert all(part is None or part.dtype == torch.float32 for part in vars(model.static_queries()).values())


def test_new_queries_are_learned_in_a_further_group(any_family):
    torch.manual_seed(0)
    model = model_of(any_family).train()
    queries = model.new_queries(6)
    assert len(queries) == 6
    model.query_adapters[AUXILIARY] = LearnedQueries(queries)
    group = model(**BATCH, request=request_for({AUXILIARY: None})).groups[AUXILIARY]
    assert group.logits.shape == (3, 2, 6, group.logits.shape[-1])
    group.boxes.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.query_adapters.parameters())
    assert list(model.query_adapters.parameters())


def test_new_queries_are_drawn_apart(family):
    """Contents and positions N(0, 1), as what decoders norm; points and boxes all over the image."""
    torch.manual_seed(0)
    queries = tiny_model(model_type=family).new_queries(500)
    for part in (queries.content, queries.position):
        assert part is None or (0.95 < part.std() < 1.05 and part.mean().abs() < 0.05)
    if queries.anchors is not None:  # between the sigmoid of N(0, 1) and uniform
        assert 0.19 < queries.anchors[:, :2].std() < 0.31 and queries.anchors.shape[1] in (2, 4)


@pytest.mark.parametrize("known", ["content", "position", "both"])
def test_queries_of_another_family_and_width_are_taken(any_family, known):
    """Content alone, position alone, both; anchors of two or four numbers, for whoever uses them."""
    model = model_of(any_family)
    content, position = random_queries(5, 48, seed=1).position, random_queries(5, 48, seed=2).position
    content, position = None if known == "position" else content, None if known == "content" else position
    model.query_adapters[AUXILIARY] = QueryAdapter(48, model.width)
    generator = torch.Generator().manual_seed(0)
    for anchors in (None, torch.rand(5, 2, generator=generator), torch.rand(2, 5, 4, generator=generator)):
        if anchors is not None and model.anchor_size > anchors.shape[-1]:
            continue
        group = model(**BATCH, request=request_for({AUXILIARY: Queries(content, position, anchors)})).groups[AUXILIARY]
        assert group.logits.shape[:3] == (3, 2, 5) and group.logits.isfinite().all() and group.boxes.isfinite().all()


# what is saved


def test_saved_model_is_a_plain_stock_checkpoint(any_family, tmp_path):
    model = model_of(any_family)
    model.query_adapters[AUXILIARY] = QueryAdapter(16, model.width)
    model.save_pretrained(tmp_path)
    stock = type(model).stock_class
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [stock.__name__]
    stock_twin(model).save_pretrained(tmp_path / "twin")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "twin"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(ADAPTERS in name for name in ours)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is stock
    before = model(**BATCH)
    assert torch.equal(loaded(**BATCH).logits, before.logits)
    assert torch.equal(loaded(**BATCH).pred_boxes, before.pred_boxes)
    again = load_detector(str(tmp_path))
    assert type(again) is FAMILIES[any_family] and torch.equal(again(**BATCH).logits, before.logits)


def test_stock_twin_shares_tensors(any_family):
    model = model_of(any_family)
    stock = model.to_stock()
    assert type(stock) is type(model).stock_class
    assert torch.equal(stock(**BATCH).logits, model(**BATCH).logits)
    ours = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name: p.data_ptr() for name, p in stock.named_parameters()} == ours


def test_precision_of_a_loaded_model(any_family, tmp_path):
    """`from_pretrained` would keep a checkpoint's; what is asked for, under either name, counts."""
    model_of(any_family).half().save_pretrained(tmp_path)
    for options, dtype in (
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": None, "torch_dtype": None}, torch.float32),
        ({"dtype": "auto"}, torch.float16),
    ):
        model = FAMILIES[any_family].from_pretrained(tmp_path, **options)
        assert model.dtype == dtype and all(p.dtype == dtype for p in model.parameters()), options


def test_forward_takes_the_stock_arguments(any_family):
    """By name and by place, as trainers and exporters read them; `request` is the only further one."""
    model = model_of(any_family)
    ours, stock = (inspect.signature(each.forward).parameters for each in (model, model.stock_class))
    assert [name for name in ours if name != "request"] == [name for name in stock if name != "self"]
    assert ours["request"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(ours.values())[:2] == list(stock.values())[1:3]


def test_what_the_stock_class_records_is_recorded(family):
    """Hidden states and attention: the swapped class of a decoder had them None, or left them out."""
    model = model_of(family)
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        ours, stock = model(**BATCH, **options), model.to_stock()(**BATCH, **options)
    assert ours.keys() == stock.keys()
    for name in ("hidden_states", "decoder_hidden_states", "encoder_hidden_states"):
        if name in stock:
            assert len(ours[name]) == len(stock[name]) > 0
            assert all(map(torch.equal, ours[name], stock[name])), name


def test_a_head_of_other_classes_starts_afresh(family, tmp_path):
    """As in a model that is built with these classes, not as Transformers would start it: other numbers, as spread."""
    model = tiny_model(model_type=family).train()
    model(**BATCH)  # batch norm has statistics now
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    options = {"id2label": {i: f"class {i}" for i in range(5)}, "ignore_mismatched_sizes": True}
    loaded = type(model).from_pretrained(tmp_path, **options)
    fresh = type(model)(loaded.config)
    theirs, started = model.state_dict(), fresh.state_dict()
    different = {name for name, value in loaded.state_dict().items() if value.shape != theirs[name].shape}
    assert different and all(loaded.role_of(name) in (HEADS, QUERIES) for name in different)
    for name, value in loaded.state_dict().items():
        expected = started[name]
        if name not in different:
            assert torch.equal(value, theirs[name]), name
        elif expected.std() == 0:  # a constant, such as the bias of a prior
            assert torch.equal(value, expected), name
        else:
            few = value.numel() < 10
            assert (0.3 if few else 0.7) < value.std() / expected.std() < (3 if few else 1.4), name
            assert value.abs().max() < 2 * expected.abs().max(), name
    logits = loaded(**BATCH, request=GroupRequest()).groups[OWN].logits
    assert loaded.criterion().scores.classes(logits) == 5


def test_classes_that_are_kept_score_as_before(family, tmp_path):
    """And no object, where a family has it; another order too; saved and loaded again."""
    model = tiny_model(model_type=family)
    before = model(**BATCH, request=GroupRequest()).groups[OWN].logits
    scores, further = model.criterion().scores, before.shape[-1] - 3
    # scores of a class that is dropped choose no queries any more, where queries are chosen by scores
    names, kept = ["triangle", "circle", "rectangle"], [2, 0, 1]
    if model.static_queries() is not None:
        names, kept = names[:2], kept[:2]
    model.keep_classes(torch.tensor(kept), names)
    after = model(**BATCH, request=GroupRequest()).groups[OWN].logits
    assert model.class_names == names and scores.classes(after) == len(kept)
    close(after, before[..., [*kept, *range(3, 3 + further)]])
    model.save_pretrained(tmp_path)
    loaded = load_detector(str(tmp_path))
    assert loaded.class_names == names and loaded.config.num_labels == len(kept)
    close(loaded(**BATCH, request=GroupRequest()).groups[OWN].logits, after)


def test_inheriting_all_parts_gives_the_teachers_outputs(any_family):
    """A student of the teacher's own shape and of half its depth, in another order of classes."""
    teacher = model_of(any_family, 1, decoder_layers=4)
    student = model_of(any_family, 2, decoder_layers=4)
    copied, skipped = inherit(student, teacher, ROLES, torch.arange(3), [0, 1, 2, 3])
    assert not skipped and set(copied) == set(student.state_dict())
    assert torch.equal(student(**BATCH).logits, teacher(**BATCH).logits)
    shallow = model_of(any_family, 2, decoder_layers=2)
    copied, skipped = inherit(shallow, teacher, ROLES, torch.arange(3), [1, 3])
    assert not skipped and {name for name, _ in shallow.named_parameters()} <= set(copied)
    sources = {name: shallow.source_of(name, [1, 3, teacher.decoder_depth]) for name in copied}
    assert any(name != source for name, source in sources.items())
    assert not any(
        name != source and shallow.role_of(name) not in (DECODER, HEADS) for name, source in sources.items()
    )
    theirs = teacher.state_dict()
    assert all(torch.equal(value, theirs[sources[name]]) for name, value in shallow.state_dict().items())


# the loss


def test_assignment_is_the_cheapest(any_family):
    """Against all permutations; images with no object and with more than there are queries among them."""
    model = model_of(any_family, num_queries=4)
    group = model(**padded_batch(3), request=GroupRequest()).groups[OWN]
    targets, criterion = targets_of(random_labels([3, 0, 5])), model.criterion()
    assignment = criterion.assign(group, targets)
    assert assignment.shape == (3, 3, 4) and assignment.dtype == torch.int64
    cost = criterion.problem(criterion.scores.probabilities(group.logits), group.boxes, targets, "student").cost
    for layer in range(3):
        for image, count in enumerate([3, 0, 5]):
            held = assignment[layer, image]
            objects = held[held != NO_OBJECT].tolist()
            assert len(objects) == len(set(objects)) == min(count, 4) and all(index < count for index in objects)
            if not count:
                continue
            costs = cost[layer, image, :, :count].tolist()
            total = sum(costs[query][index] for query, index in enumerate(held.tolist()) if index != NO_OBJECT)
            assert total == pytest.approx(slow_reference.brute_force_cost(costs), abs=1e-5)


def test_losses_equal_the_stock_loss(family):
    """Term by term what `labels` give in the stock class, of the last layer."""
    model = tiny_model(model_type=family, **COMPARED.get(family, {}), **SETTINGS[family])
    labels = random_labels([2, 3])
    stock = stock_twin(model)(**BATCH, labels=labels)
    group, targets = model(**BATCH, request=GroupRequest()).groups[OWN], targets_of(labels)
    criterion = model.criterion()
    losses = criterion.losses(group, targets, criterion.assign(group, targets))
    normalisers = normalisers_of(criterion, [2, 3], model.query_count)
    means = {name: value[-1] / normalisers[name] for name, value in losses.items()}
    weighted = family in WEIGHTED_TERMS  # then Transformers returns terms with their weights
    for ours, theirs in (("class", WEIGHTED_TERMS.get(family, "loss_ce")), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        scale = criterion.weights[ours] if weighted else 1
        torch.testing.assert_close(scale * means[ours], stock.loss_dict[theirs], rtol=1e-4, atol=1e-5)
    assert criterion.weights["l1"] == 5 and criterion.weights["giou"] == 2
    total = sum(criterion.weights[name] * value for name, value in means.items())
    # Transformers weighs Conditional DETR's class loss with 1, its authors with 2; proposals have terms of their own
    if criterion.weights["class"] == 1 and not weighted and model.static_queries() is not None:
        torch.testing.assert_close(total, stock.loss, rtol=1e-4, atol=1e-5)
    close(model(**BATCH, labels=labels).loss, stock.loss)


def test_the_configuration_weighs_costs_and_losses(family):
    """No two alike, so that none can stand for another."""
    costs = {"class_cost": 3, "bbox_cost": 7, "giou_cost": 4}
    weights = {"bbox_loss_coefficient": 9, "giou_loss_coefficient": 8}
    if family in WEIGHTED_TERMS:
        costs = {f"matcher_{name}": float(value) for name, value in costs.items()}
        weights = {"weight_loss_bbox": 9.0, "weight_loss_giou": 8.0}
    criterion = tiny_model(model_type=family, **costs, **weights, **SETTINGS[family]).criterion()
    score = 0.2
    if isinstance(criterion.scores, SoftmaxScores):
        cost = -score
    else:  # focal; where the matcher has no settings of its own the stock class fixes them
        alpha, gamma = SETTINGS[family].get("matcher_alpha", 0.25), SETTINGS[family].get("matcher_gamma", 2)
        cost = -alpha * (1 - score) ** gamma * math.log(score) + (1 - alpha) * score**gamma * math.log(1 - score)
    found = criterion.class_costs(torch.full((1, 1, 1, 3), score), torch.tensor([[1]]))
    assert float(found) == pytest.approx(cost, rel=1e-5)
    assert (criterion.class_cost, criterion.l1_cost, criterion.giou_cost) == (3, 7, 4)
    assert (criterion.weights["l1"], criterion.weights["giou"]) == (9, 8)


# what stands beside it


def test_image_processor_and_pipeline_are_the_familys(family, tmp_path):
    import numpy as np
    from PIL import Image

    model = tiny_model(model_type=family)
    processor = small_image_processor(family)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    # what Transformers looks up, for any backend
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"]
    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(family, {"torchvision": saved})
    assert saved == named["torchvision"] and saved in dir(transformers)
    assert type(load_image_processor(str(tmp_path))) is type(processor)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = pipeline("object-detection", model=str(tmp_path), image_processor=processor, threshold=0.0)(image)
    group = model(**processor(images=image, return_tensors="pt"), request=GroupRequest()).groups[OWN]
    best = model.criterion().scores.probabilities(group.logits[-1]).max()
    assert found and {row["label"] for row in found} <= set(model.class_names)
    assert max(row["score"] for row in found) == pytest.approx(float(best.detach()), abs=1e-4)


def test_what_people_read_of_a_family(any_family):
    model_class = FAMILIES[any_family]
    assert model_class.title and model_class.tag and model_class.citation.startswith("@")
    assert model_class.stock_class.config_class.model_type == any_family
    model = model_of(any_family)
    assert model.anchor_size in (0, 2, 4) and isinstance(model.makes_anchors, bool)
    assert model.class_names == ["circle", "rectangle", "triangle"]
    assert model.skipped_layers is None
