"""Criteria that ask for overlap, against their formula, written slowly, and against Transformers' own modules."""

import math

import pytest
import torch
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from d3etr_hf.losses import IouAwareCriterion, VarifocalCriterion
from d3etr_hf.outputs import NO_OBJECT, GroupOutput
from d3etr_hf.outputs.boxes import iou
from tests import slow_reference
from tests.tiny import random_labels, targets_of, tiny_config

CRITERION = IouAwareCriterion(2.0, 5.0, 2.0, 1.0, 5.0, 2.0, score_exponent=0.3)
COUNTS = [2, 0, 5, 9]  # an image with no box, and one with more boxes than queries


def group_and_labels(counts=COUNTS):
    mask = torch.ones(4, 2, 2, dtype=torch.bool)
    group = slow_reference.random_group(3, 4, 6, 3, 1, mask, seed=3)
    labels = random_labels(counts, 3)
    for label in labels:
        label["boxes"] = label["boxes"].double()
    return group, labels


def slow_iou(first, second) -> float:
    (x0, y0, w0, h0), (x1, y1, w1, h1) = first.tolist(), second.tolist()
    width = min(x0 + w0 / 2, x1 + w1 / 2) - max(x0 - w0 / 2, x1 - w1 / 2)
    height = min(y0 + h0 / 2, y1 + h1 / 2) - max(y0 - h0 / 2, y1 - h1 / 2)
    shared = max(width, 0) * max(height, 0)
    return shared / (w0 * h0 + w1 * h1 - shared)


def slow_class_loss(logits, boxes, labels, assignment) -> float:
    """One layer's, score by score."""
    total = 0.0
    for image, label in enumerate(labels):
        for query, held in enumerate(assignment[image].tolist()):
            for index, logit in enumerate(logits[image, query].tolist()):
                score = 1 / (1 + math.exp(-logit))
                if held == NO_OBJECT or index != int(label["class_labels"][held]):
                    total -= score**2 * math.log(1 - score)
                    continue
                target = max(score**0.3 * slow_iou(boxes[image, query], label["boxes"][held]) ** 0.7, 0.01)
                total -= target * math.log(score) + (1 - target) * math.log(1 - score)
    return total


def test_class_loss_equals_the_formula():
    group, labels = group_and_labels()
    assignment = CRITERION.assign(group, targets_of(labels))
    losses = CRITERION.losses(group, targets_of(labels), assignment)["class"].detach()
    for layer in range(3):
        expected = slow_class_loss(group.logits[layer], group.boxes[layer], labels, assignment[layer])
        assert float(losses[layer]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 0]], ids=["objects", "no object"])
def test_equals_transformers(counts):
    """Values, gradients and assignment."""
    group, labels = group_and_labels(counts)
    logits, boxes = group.logits.detach().requires_grad_(), group.boxes.detach().requires_grad_()
    targets, group = targets_of(labels), GroupOutput(logits=logits, boxes=boxes)
    assignment = CRITERION.assign(group, targets)
    losses = CRITERION.losses(group, targets, assignment)
    ours = torch.autograd.grad(sum(value.sum() for value in losses.values()), (logits, boxes))
    module = LwDetrImageLoss(None, 3, 0.3, ["labels", "boxes"], group_detr=1)
    matcher = LwDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    total = 0
    for layer in range(3):
        outputs = {"logits": logits[layer], "pred_boxes": boxes[layer]}
        pairs = matcher(outputs, labels, group_detr=1)
        found = module.get_loss("labels", outputs, labels, pairs, 1) | module.get_loss(
            "boxes", outputs, labels, pairs, 1
        )
        for name, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
            torch.testing.assert_close(losses[name][layer], found[theirs].to(losses[name].dtype), rtol=1e-5, atol=1e-6)
            total = total + found[theirs]
    theirs = torch.autograd.grad(total, (logits, boxes))
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vfl", "mal"])
def test_varifocal_equals_transformers(name):
    """Values and gradients of RT-DETR's and of DEIMv2's class loss: neither weights nor targets have any."""
    weights = 2.0, 5.0, 2.0, 1.0, 5.0, 2.0
    if name == "vfl":
        module = RTDetrLoss(tiny_config("rt_detr", focal_loss_alpha=0.6, focal_loss_gamma=1.7))
        criterion = VarifocalCriterion(*weights, background_alpha=0.6, background_gamma=1.7)
    else:
        module = Deimv2Loss(tiny_config("deimv2", mal_alpha=0.6, focal_loss_gamma=1.7))
        settings = {"background_alpha": 0.6, "background_gamma": 1.7, "target_exponent": 1.7}
        criterion = VarifocalCriterion(*weights, **settings, weighs_overlap=False)
    group, labels = group_and_labels()
    logits, boxes = group.logits.detach().requires_grad_(), group.boxes.detach().requires_grad_()
    group = GroupOutput(logits=logits, boxes=boxes)
    assignment = criterion.assign(group, targets_of(labels))
    ours, theirs = criterion.losses(group, targets_of(labels), assignment)["class"], []
    for layer, held in enumerate(assignment):
        pairs = [((image != NO_OBJECT).nonzero().squeeze(1), image[image != NO_OBJECT]) for image in held]
        outputs = {"logits": logits[layer], "pred_boxes": boxes[layer]}
        theirs.append(module.get_loss(name, outputs, labels, pairs, 1))
    theirs = torch.stack([next(iter(found.values())) for found in theirs])
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(ours.sum(), boxes, retain_graph=True, allow_unused=True) == (None,)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("logit", [-700.0, -90.0, 18.0, 40.0, 200.0])
def test_class_loss_of_any_logit_is_right(logit):
    """In float32 the module of Transformers gives NaN below about -104 and inf above 17."""
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.25, 0.25]])}]
    logits = torch.tensor([[[[logit, -logit], [-1.0, 1.0]]]], requires_grad=True)
    boxes = torch.tensor([[0.5, 0.5, 0.25, 0.25], [0.5, 0.5, 0.3, 0.2]]).expand(1, 1, 2, 4)
    assignment = torch.tensor([[[0, NO_OBJECT]]])
    loss = CRITERION.losses(GroupOutput(logits=logits, boxes=boxes), targets_of(labels), assignment)["class"].sum()
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    held, others = exact[0, 0, 0, 1], torch.stack([exact[0, 0, 0, 0], *exact[0, 0, 1]])
    log = torch.nn.functional.logsigmoid
    target = (0.3 * log(held)).exp().clamp(min=0.01).detach()
    expected = -(2 * log(others)).exp() @ log(-others) - target * log(held) - (1 - target) * log(-held)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    module = LwDetrImageLoss(None, 2, 0.3, ["labels"], group_detr=1)
    pairs = [(torch.tensor([0]), torch.tensor([0]))]
    outputs = {"logits": logits.detach()[0], "pred_boxes": boxes[0]}
    stock = module.get_loss("labels", outputs, labels, pairs, 1)["loss_ce"]
    assert stock.isfinite() == (abs(logit) < 17)


def test_overlap_of_boxes_without_area():
    empty = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert float(iou(empty, empty)) == float(iou(empty, torch.tensor([0.5, 0.5, 0.2, 0.2]))) == 0
