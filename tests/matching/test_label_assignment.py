"""Label assignment against Transformers' matcher and its own edges."""

import pytest
import torch
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from d3etr_hf.errors import NonFiniteCostError
from d3etr_hf.losses import FocalCriterion
from d3etr_hf.outputs import NO_OBJECT
from tests import slow_reference
from tests.tiny import random_labels, targets_of

CRITERION = FocalCriterion(2.0, 5.0, 2.0, 2.0, 5.0, 2.0)


def group(queries=6, seed=0):
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    return slow_reference.random_group(2, 3, queries, 4, 1, mask, seed)


def test_equals_stock_matcher_layer_by_layer():
    """With an image that has no box and one that has more boxes than queries."""
    labels = random_labels([3, 0, 8], classes=4)
    for label in labels:
        label["boxes"] = label["boxes"].double()
    outputs = group()
    assignment = CRITERION.assign(outputs, targets_of(labels))
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    for layer in range(2):
        stock = matcher({"logits": outputs.logits[layer], "pred_boxes": outputs.boxes[layer]}, labels)
        for image, (queries, objects) in enumerate(stock):
            expected = torch.full((6,), NO_OBJECT)
            expected[queries] = objects
            assert torch.equal(assignment[layer, image], expected)


def test_non_finite_prediction_is_refused():
    outputs = group()
    with torch.no_grad():
        outputs.boxes[0, 2] = float("nan")
    with pytest.raises(NonFiniteCostError, match="ground truth to student queries.*layer 0, image 2"):
        CRITERION.assign(outputs, targets_of(random_labels([1, 1, 1], classes=4)))
