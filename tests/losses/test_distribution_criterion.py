"""The criterion of box distributions, against Transformers' loss of the same predictions and against slow loops."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss

from d3etr_hf.losses.distribution_criterion import union_of
from d3etr_hf.outputs import AUXILIARY, NO_OBJECT, OWN, GroupOutput, GroupRequest
from tests.slow_reference import with_bins_of
from tests.tiny import padded_batch, random_labels, targets_of, tiny_model

PIXELS = padded_batch()["pixel_values"]
LABELS = random_labels([2, 3])
TARGETS = targets_of(LABELS)
STOCK_NAMES = {"class": "loss_vfl", "l1": "loss_bbox", "giou": "loss_giou"}


def model_of(**changes):
    return tiny_model(0, "d_fine", **changes).train()


def pairs_of(assignment: torch.Tensor) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Layer by layer and image by image queries and their objects, as Transformers' losses take them."""
    images = [[(image != NO_OBJECT).nonzero().squeeze(1) for image in layer] for layer in assignment]
    return [
        [(queries, image[queries]) for queries, image in zip(held, layer, strict=True)]
        for held, layer in zip(images, assignment, strict=True)
    ]


def output_of(model, targets=TARGETS):
    torch.manual_seed(5)
    return model(PIXELS, request=GroupRequest(targets=targets))


def losses_of(criterion, part: GroupOutput, assignment=None):
    assignment = criterion.assign(part, TARGETS) if assignment is None else assignment
    return criterion.losses(part, TARGETS, assignment)


def test_terms_of_every_layer_are_those_of_the_stock_loss():
    """Layer by layer under the names that its dictionary has for them, boxes beyond the image among them.

    It leaves out the last layer but one, and of denoising queries the last (`zip` ends with the shorter list).
    """
    ones = {f"weight_loss_{name}": 1.0 for name in ("vfl", "bbox", "giou")}
    model = model_of(**ones)
    with torch.no_grad():  # every box begins further left, and moves left by its width
        model.model.decoder.pre_bbox_head.layers[-1].bias[0] -= 2
        model.bbox_embed[0].layers[-1].bias[[32, 2 * 33]] = 30.0
    output, criterion = output_of(model), model.criterion()
    torch.manual_seed(5)
    stock = model.to_stock().train()(PIXELS, labels=LABELS).loss_dict
    own, supervised = output.groups[OWN], output.supervised
    assert own.boxes.max() > 1 or own.boxes.min() < 0
    parts = {
        "first_head": (supervised["first_head"].group, ["_aux_0"], None),
        OWN: (own, ["_aux_1", None, ""], None),
        "proposals": (supervised["proposals"].group, ["_aux_2"], None),
    }
    for name, suffixes in (("denoising_first_head", ["_dn_0"]), ("denoising", ["_dn_1", "_dn_2", None])):
        part = supervised[name]
        parts[name] = (part.group, suffixes, part.assignment)
    repeats = supervised["denoising"].repeats
    for group, suffixes, assignment in parts.values():
        terms = losses_of(criterion, group, assignment)
        for term, stock_name in STOCK_NAMES.items():
            for layer, suffix in enumerate(suffixes):
                if suffix is None:
                    continue
                objects = 5 * (repeats if "dn" in suffix else 1)
                mean = terms[term][layer] / objects
                torch.testing.assert_close(mean, stock[f"{stock_name}{suffix}"], rtol=1e-4, atol=1e-5)


def test_distribution_terms_go_with_the_predictions_of_their_layer():
    """As the authors call the very functions of Transformers; there layer k's boxes weigh layer k + 1's corners."""
    model = model_of(weight_loss_fgl=1.0, weight_loss_ddf=1.0)
    output, criterion = output_of(model), model.criterion()
    loss = with_bins_of(DFineLoss(model.config), model)
    for group, assignment in (
        (output.groups[OWN], criterion.assign(output.groups[OWN], TARGETS)),
        (output.supervised["denoising"].group, output.supervised["denoising"].assignment),
    ):
        terms = losses_of(criterion, group, assignment)
        for layer, pairs in enumerate(pairs_of(assignment)):
            given = {
                "pred_boxes": group.boxes[layer].clamp(0, 1),
                "pred_corners": group.box_distribution[layer].flatten(2),
                "ref_points": group.box_reference,
                "teacher_corners": group.box_distribution[2].flatten(2),
                "teacher_logits": group.logits[2],
            }
            expected = loss.loss_local(given, LABELS, pairs, 5)
            torch.testing.assert_close(terms["fgl"][layer] / 5, expected["loss_fgl"])
            queries = 2 * group.boxes.shape[2]
            torch.testing.assert_close(terms["ddf"][layer] / queries, expected["loss_ddf"])
        assert terms["ddf"][-1] == 0 < terms["ddf"][0] and terms["fgl"].min() > 0
    assert set(losses_of(criterion, output.supervised["first_head"].group)) == set(STOCK_NAMES)
    counts = [torch.tensor(count) for count in (5, 4, 14)]
    assert {name: int(value) for name, value in criterion.normalisers(*counts).items()} == {
        "class": 5,
        "l1": 5,
        "giou": 5,
        "fgl": 5,
        "ddf": 14,
    }
    assert criterion.weights == {"class": 1, "l1": 5, "giou": 2, "fgl": 1, "ddf": 1}


def test_earlier_layers_learn_from_the_last_and_not_the_other_way():
    model = model_of()
    output, criterion = output_of(model), model.criterion()
    group = output.groups[OWN]
    losses_of(criterion, group)["ddf"].sum().backward()
    gradients = [layer.layers[-1].bias.grad for layer in model.bbox_embed]
    assert gradients[0].abs().max() > 0 and gradients[1].abs().max() > 0
    assert gradients[2] is None or gradients[2].abs().max() == 0


def test_what_distributions_weigh_has_no_gradient():
    """As in Transformers' `loss_local`: boxes are not drawn to, nor scores away from, where distributions err."""
    model = model_of()
    own, criterion = output_of(model).groups[OWN], model.criterion()
    leaves = own.logits.detach().requires_grad_(), own.boxes.detach().requires_grad_()
    terms = losses_of(criterion, replace(own, logits=leaves[0], boxes=leaves[1]))
    for name in ("fgl", "ddf"):
        for gradient in torch.autograd.grad(terms[name].sum(), leaves, retain_graph=True, allow_unused=True):
            assert gradient is None or not gradient.any()
        assert terms[name].sum() > 0


def slow_union(assignment: torch.Tensor) -> torch.Tensor:
    """By counting pairs, image by image and query by query."""
    union = torch.full(assignment.shape[1:], NO_OBJECT)
    for image in range(union.shape[0]):
        for query in range(union.shape[1]):
            votes = Counter(sorted(index for index in assignment[:, image, query].tolist() if index != NO_OBJECT))
            if votes:
                union[image, query] = max(votes, key=lambda index: (votes[index], -index))
    return union


@pytest.mark.parametrize("seed", range(5))
def test_the_union_is_what_most_layers_say(seed):
    generator = torch.Generator().manual_seed(seed)
    assignment = torch.randint(-1, 3, (5, 2, 9), generator=generator)
    assert torch.equal(union_of(assignment), slow_union(assignment))
    assert (union_of(torch.full((2, 1, 3), NO_OBJECT)) == NO_OBJECT).all()


def test_the_union_is_transformers():
    """Where no two objects have the same number of votes, which its order leaves open."""
    assignment = torch.tensor([[[0, 1, -1, 2]], [[0, 1, -1, -1]], [[2, 0, -1, 1]], [[2, 1, -1, 1]], [[2, 1, -1, 1]]])
    *aux, last = pairs_of(assignment)
    ((queries, objects),) = Deimv2Loss._get_dense_o2o_indices(None, last, aux)
    expected = torch.full((1, 4), NO_OBJECT)
    expected[0, queries] = objects
    assert torch.equal(union_of(assignment), expected)


def test_unions_are_of_predictions_that_share_queries():
    criterion = model_of().criterion()
    torch.manual_seed(0)
    shapes = {OWN: 3, "first_head": 1, "proposals": 1, AUXILIARY: 3, "auxiliary_first_head": 1, "other": 2}
    shapes |= {"auxiliary_3": 3, "auxiliary_3_first_head": 1}
    given = {name: torch.randint(-1, 3, (layers, 2, 7)) for name, layers in shapes.items()}
    found = criterion.box_assignments(given)
    assert set(found) == set(given) - {"other"}
    groups = (OWN, "first_head", "proposals"), *((name, f"{name}_first_head") for name in (AUXILIARY, "auxiliary_3"))
    for names in groups:
        union = slow_union(torch.cat([given[name] for name in names]))
        assert all(torch.equal(found[name], union) for name in names)
    assert set(criterion.box_assignments({"auxiliary_first_head": given[AUXILIARY]})) == {"auxiliary_first_head"}


def test_losses_of_boxes_take_the_assignment_of_boxes():
    model = model_of()
    output, criterion = output_of(model), model.criterion()
    group = output.groups[OWN]
    own = criterion.assign(group, TARGETS)
    other = own.flip(-1)
    mixed, first, second = (
        criterion.losses(group, TARGETS, *assignments) for assignments in ((own, other), (own,), (other,))
    )
    for term, value in mixed.items():
        assert torch.equal(value, (first if term == "class" else second)[term]), term
        assert not torch.equal(first[term], second[term])
