"""The detection loss against the original criterion's formula, written slowly, and against Transformers' own."""

import pytest
import torch
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from d3etr_hf.losses import detection_losses
from d3etr_hf.matching import HungarianAssigner, Targets
from tests import slow_reference
from tests.tiny import random_labels, tiny_config

LAYERS, BATCH, QUERIES, CLASSES = 3, 4, 6, 3
COUNTS = [2, 0, 5, 9]  # an image with no box, and one with more boxes than queries


def group_and_labels(counts=COUNTS):
    mask = torch.ones(BATCH, 2, 2, dtype=torch.bool)
    group = slow_reference.random_group(LAYERS, BATCH, QUERIES, CLASSES, 1, mask, seed=3)
    labels = random_labels(counts, CLASSES)
    for label in labels:
        label["boxes"] = label["boxes"].double()
    return group, labels


def test_equals_original_criterion():
    """HF_NOTES 10: and the class loss is weighed by the caller, with `cls_loss_coefficient`."""
    group, labels = group_and_labels()
    targets = Targets.from_labels(labels)
    assignment = HungarianAssigner()(group, targets)
    losses = detection_losses(group, targets, assignment, boxes=sum(COUNTS))
    for k in range(LAYERS):
        slow = slow_reference.detection_loss(group.logits[k], group.boxes[k], labels, assignment[k], sum(COUNTS))
        for name, value in slow.items():
            assert float(losses[name][k]) == pytest.approx(value, rel=1e-6)


def test_equals_stock_loss_on_one_process():
    group, labels = group_and_labels()
    targets = Targets.from_labels(labels)
    losses = detection_losses(group, targets, HungarianAssigner()(group, targets), boxes=sum(COUNTS))
    config = tiny_config(auxiliary_loss=True)
    _, stock, _ = DeformableDetrForObjectDetectionLoss(
        group.logits[-1], labels, "cpu", group.boxes[-1], config, group.logits, group.boxes
    )
    for ours, theirs in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        per_layer = [stock[f"{theirs}_{k}"] for k in range(LAYERS - 1)] + [stock[theirs]]
        torch.testing.assert_close(losses[ours], torch.stack(per_layer), rtol=1e-6, atol=0)


def test_batch_without_any_box_still_learns_background():
    """HF_NOTES 12: empty labels; nothing may be gathered from them."""
    group, labels = group_and_labels([0] * BATCH)
    targets = Targets.from_labels(labels)
    assignment = HungarianAssigner()(group, targets)
    losses = detection_losses(group, targets, assignment, boxes=1)
    assert (assignment == -1).all()
    assert losses["l1"].abs().max() == 0 and losses["giou"].abs().max() == 0
    slow = slow_reference.detection_loss(group.logits[0], group.boxes[0], labels, assignment[0], 1)
    assert float(losses["class"][0]) == pytest.approx(slow["class"], rel=1e-6)


def test_identical_boxes_without_area_give_no_nan():
    """HF_NOTES 12: the GIoU of two identical boxes of zero area."""
    group, labels = group_and_labels([1] * BATCH)
    with torch.no_grad():
        group.boxes[..., 2:] = 0.0
    for image, label in enumerate(labels):
        label["boxes"] = group.boxes[0, image, :1].detach().clone()
    targets = Targets.from_labels(labels)
    losses = detection_losses(group, targets, HungarianAssigner()(group, targets), boxes=BATCH)
    sum(value.sum() for value in losses.values()).backward()
    assert all(value.isfinite().all() for value in losses.values())
    assert group.boxes.grad.isfinite().all()
