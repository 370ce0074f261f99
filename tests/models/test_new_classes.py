"""Class heads for other data: rows of classes with the same name go on, the others start as the family's do."""

import logging

import pytest
import torch

from d3etr_hf.models.loading import FAMILIES, ModelArguments, build_model, load_detector
from d3etr_hf.models.new_classes import class_dimensions, with_new_classes
from d3etr_hf.outputs import OWN, GroupRequest
from tests.tiny import padded_batch, tiny_model

BATCH = padded_batch()
NAMES = ["square", "Triangle ", "hexagon", "circle"]  # the tiny models know circle, rectangle and triangle


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    return tiny_model(model_type=request.param)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**BATCH, request=GroupRequest()).groups[OWN].logits


def test_known_classes_go_on_and_all_else_is_copied(model):
    """By what comes out, so for every head that a family has: no object, last, is no class and goes on, too.

    Where scores choose the queries, other classes choose others: there the rows themselves are compared.
    """
    before, state = logits_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    new = with_new_classes(model, NAMES)
    after = logits_of(new)
    assert type(new) is type(model) and new.class_names == NAMES and new.config.label2id["hexagon"] == 2
    further = before.shape[-1] - 3
    assert after.shape[-1] == 4 + further
    known, were = [1, 3, *range(4, 4 + further)], [2, 0, *range(3, 3 + further)]
    if model.static_queries() is not None:
        torch.testing.assert_close(after[..., known], before[..., were])
    for name, dimension in class_dimensions(model).items():
        rows = new.state_dict()[name].index_select(dimension, torch.tensor([1, 3]))
        assert torch.equal(rows, state[name].index_select(dimension, torch.tensor([2, 0]))), name
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # the model is as it was
    heads = class_dimensions(model)
    assert heads and all(
        torch.equal(value, state[name]) for name, value in new.state_dict().items() if name not in heads
    )
    trains = [{name for name, value in each.named_parameters() if value.requires_grad} for each in (model, new)]
    assert trains[0] == trains[1]


def test_unknown_classes_start_as_the_familys_do(model):
    """Even where the number of classes is the same, so that every tensor fits."""
    state = model.state_dict()
    torch.manual_seed(5)
    new = with_new_classes(model, ["square", "hexagon", "circle"]).state_dict()
    torch.manual_seed(5)
    fresh = type(model)(model.config).state_dict()
    for name, dimension in class_dimensions(model).items():
        rows = torch.tensor([0, 1])
        assert torch.equal(new[name].index_select(dimension, rows), fresh[name].index_select(dimension, rows)), name
        assert torch.equal(new[name].select(dimension, 2), state[name].select(dimension, 0)), name


def test_proposals_of_two_stages_stay_as_they_are():
    """Their first output ranks them, whatever class comes first."""
    model = tiny_model(model_type="deformable_detr", two_stage=True)
    before = logits_of(model)
    reordered = with_new_classes(model, ["triangle", "rectangle", "circle"])
    torch.testing.assert_close(logits_of(reordered), before[..., [2, 1, 0]])


def test_a_name_that_the_model_has_twice_starts_afresh(caplog):
    """COCO's 91 classes hold N/A eleven times."""
    caplog.set_level(logging.INFO, logger="d3etr_hf")
    model = tiny_model(id2label={0: "N/A", 1: "circle", 2: "N/A"}, label2id={"N/A": 0, "circle": 1})
    new = with_new_classes(model, ["n/a", "circle"])
    head, source = new.class_labels_classifier, model.class_labels_classifier
    assert torch.equal(head.weight[1], source.weight[1])
    assert not any(torch.equal(head.weight[0], row) for row in source.weight)
    assert "of 2 classes 1 go on from the model's own of the same name, 1 start afresh: ['n/a']" in caplog.text


def test_asked_for_on_a_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "start")
    arguments = ModelArguments(model=str(tmp_path / "start"), new_head=True)
    built = build_model(arguments, NAMES)
    built.save_pretrained(tmp_path / "saved")
    saved = load_detector(str(tmp_path / "saved"))
    assert saved.class_names == NAMES
    torch.testing.assert_close(logits_of(saved), logits_of(built))
    same = build_model(arguments, ["circle", "rectangle", "triangle"])
    torch.testing.assert_close(logits_of(same), logits_of(model), atol=0, rtol=0)
