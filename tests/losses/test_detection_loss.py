"""The criteria against the original formulas, written slowly, and against Transformers' own losses and matchers."""

import pytest
import torch
from transformers.loss.loss_deformable_detr import (
    DeformableDetrForObjectDetectionLoss,
    DeformableDetrHungarianMatcher,
)
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, HungarianMatcher

from d3etr_hf.losses import CrossEntropyCriterion, FocalCriterion
from d3etr_hf.outputs import NO_OBJECT
from tests import slow_reference
from tests.tiny import normalisers_of, random_labels, targets_of, tiny_config

LAYERS, BATCH, QUERIES, CLASSES = 3, 4, 6, 3
COUNTS = [2, 0, 5, 9]  # an image with no box, and one with more boxes than queries
FOCAL = FocalCriterion(2.0, 5.0, 2.0, 2.0, 5.0, 2.0)
CROSS_ENTROPY = CrossEntropyCriterion(1.0, 5.0, 2.0, 1.0, 5.0, 2.0, no_object_weight=0.1)


def group_and_labels(counts=COUNTS, outputs=CLASSES):
    mask = torch.ones(BATCH, 2, 2, dtype=torch.bool)
    group = slow_reference.random_group(LAYERS, BATCH, QUERIES, outputs, 1, mask, seed=3)
    labels = random_labels(counts, CLASSES)
    for label in labels:
        label["boxes"] = label["boxes"].double()
    return group, labels


def divided_losses(criterion, group, labels, counts=COUNTS):
    """The losses as the means that the original code computes, and the assignment."""
    targets = targets_of(labels)
    assignment = criterion.assign(group, targets)
    normalisers = normalisers_of(criterion, counts, QUERIES)
    losses = criterion.losses(group, targets, assignment)
    assert list(losses) == list(normalisers) == list(criterion.weights) == ["class", "l1", "giou"]
    return {name: value / (normalisers[name] or 1) for name, value in losses.items()}, assignment


def test_equals_original_criterion():
    """HF_NOTES 10: and the class loss is weighed by the caller, with `cls_loss_coefficient`."""
    group, labels = group_and_labels()
    losses, assignment = divided_losses(FOCAL, group, labels)
    for k in range(LAYERS):
        slow = slow_reference.detection_loss(group.logits[k], group.boxes[k], labels, assignment[k], sum(COUNTS))
        for name, value in slow.items():
            assert float(losses[name][k].detach()) == pytest.approx(value, rel=1e-6)


def test_cross_entropy_equals_slow_loop():
    """A mean that is weighted by class; the boxes of queries that hold an object."""
    group, labels = group_and_labels(outputs=CLASSES + 1)
    losses, assignment = divided_losses(CROSS_ENTROPY, group, labels)
    for k in range(LAYERS):
        slow = slow_reference.cross_entropy_loss(group.logits[k], labels, assignment[k], no_object_weight=0.1)
        assert float(losses["class"][k].detach()) == pytest.approx(slow, rel=1e-6)
        boxes = slow_reference.detection_loss(group.logits[k], group.boxes[k], labels, assignment[k], sum(COUNTS))
        for name in ("l1", "giou"):
            assert float(losses[name][k].detach()) == pytest.approx(boxes[name], rel=1e-6)


@pytest.mark.parametrize(
    ("criterion", "model_type", "stock_loss", "outputs"),
    [
        (FOCAL, "conditional_detr", DeformableDetrForObjectDetectionLoss, CLASSES),
        (CROSS_ENTROPY, "detr", ForObjectDetectionLoss, CLASSES + 1),
    ],
    ids=["focal", "cross-entropy"],
)
@pytest.mark.parametrize("counts", [COUNTS, [1, 2, 3, 4], [0, 0, 0, 0]], ids=str)
def test_equals_stock_loss_on_one_process(criterion, model_type, stock_loss, outputs, counts):
    """Unweighted terms of every layer, each under its own stock assignment.

    The class loss of stock DETR is a mean that `normalisers` reproduces; box losses of a batch without any object are
    divided by one.
    """
    group, labels = group_and_labels(counts, outputs)
    if criterion is CROSS_ENTROPY:  # the stock class weights are float32 and mix with nothing else
        group = type(group)(logits=group.logits.float(), boxes=group.boxes.float())
        labels = [label | {"boxes": label["boxes"].float()} for label in labels]
    losses, _ = divided_losses(criterion, group, labels, counts)
    config = tiny_config(model_type, auxiliary_loss=True)
    _, stock, _ = stock_loss(group.logits[-1], labels, "cpu", group.boxes[-1], config, group.logits, group.boxes)
    for ours, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        per_layer = torch.stack([stock[f"{theirs}_{k}"] for k in range(LAYERS - 1)] + [stock[theirs]])
        torch.testing.assert_close(losses[ours], per_layer, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("criterion", "matcher", "outputs"),
    [
        (FOCAL, DeformableDetrHungarianMatcher, CLASSES),
        (CROSS_ENTROPY, HungarianMatcher, CLASSES + 1),
    ],
    ids=["focal", "cross-entropy"],
)
def test_assignment_equals_stock_matcher(criterion, matcher, outputs):
    group, labels = group_and_labels(outputs=outputs)
    assignment = criterion.assign(group, targets_of(labels))
    stock = matcher(class_cost=criterion.class_cost, bbox_cost=5, giou_cost=2)
    for layer in range(LAYERS):
        pairs = stock({"logits": group.logits[layer], "pred_boxes": group.boxes[layer]}, labels)
        for image, (queries, objects) in enumerate(pairs):
            expected = torch.full((QUERIES,), NO_OBJECT)
            expected[queries] = objects
            assert torch.equal(assignment[layer, image], expected)


@pytest.mark.parametrize("criterion", [FOCAL, CROSS_ENTROPY], ids=["focal", "cross-entropy"])
def test_losses_and_normalisers_of_batches_add_up(criterion):
    """Sums over images: what the trainer relies on for processes and accumulated batches."""
    group, labels = group_and_labels(outputs=CLASSES + 1)
    if criterion is FOCAL:
        group.logits = group.logits[..., :CLASSES]
    targets = targets_of(labels)
    whole = criterion.losses(group, targets, criterion.assign(group, targets))
    parts, counted = [], []
    for images in (slice(0, 1), slice(1, 2), slice(2, 4)):
        part = type(group)(logits=group.logits[:, images], boxes=group.boxes[:, images])
        some = targets_of(labels[images])
        parts.append(criterion.losses(part, some, criterion.assign(part, some)))
        counted.append(normalisers_of(criterion, COUNTS[images], QUERIES))
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-9, atol=1e-12)
        assert sum(part[name] for part in counted) == pytest.approx(normalisers_of(criterion, COUNTS, QUERIES)[name])


def test_batch_without_any_box_still_learns_background():
    """HF_NOTES 12: empty labels; nothing may be gathered from them."""
    group, labels = group_and_labels([0] * BATCH)
    losses, assignment = divided_losses(FOCAL, group, labels, [0] * BATCH)
    assert (assignment == -1).all()
    assert losses["l1"].abs().max() == 0 and losses["giou"].abs().max() == 0
    slow = slow_reference.detection_loss(group.logits[0], group.boxes[0], labels, assignment[0], 1)
    assert float(losses["class"][0].detach()) == pytest.approx(slow["class"], rel=1e-6)


@pytest.mark.parametrize("criterion", [FOCAL, CROSS_ENTROPY], ids=["focal", "cross-entropy"])
def test_identical_boxes_without_area_give_no_nan(criterion):
    """HF_NOTES 12: the GIoU of two identical boxes of zero area."""
    group, labels = group_and_labels([1] * BATCH, CLASSES + (criterion is CROSS_ENTROPY))
    with torch.no_grad():
        group.boxes.copy_(group.boxes.float())  # targets are float32: else they would not be identical
        group.boxes[..., 2:] = 0.0
    for image, label in enumerate(labels):
        label["boxes"] = group.boxes[0, image, :1].detach().clone()
        label["class_labels"] = label["class_labels"][:1]
    assert torch.equal(targets_of(labels).boxes[:, 0].double(), group.boxes[0, :, 0])
    losses, _ = divided_losses(criterion, group, labels, [1] * BATCH)
    sum(value.sum() for value in losses.values()).backward()
    assert all(value.isfinite().all() for value in losses.values())
    assert group.boxes.grad.isfinite().all()
