"""The detection criterion whose classification targets are made of scores and IoU."""

from dataclasses import dataclass

import torch
from torch import nn

from d3etr_hf.losses.detection_loss import FocalCriterion
from d3etr_hf.outputs import NO_OBJECT, GroupOutput, Targets, wide
from d3etr_hf.outputs.boxes import iou

# the least target of a query that holds an object
LEAST_TARGET = 0.01


@dataclass(frozen=True)
class IouAwareCriterion(FocalCriterion):
    """LW-DETR's (Chen et al., 2024): binary cross-entropy of a query's score for the class of its object with the
    target score^a IoU^(1 - a), and of its other scores with zero, weighted by their squares. Costs are the focal ones.

    Equal to `LwDetrImageLoss` of Transformers, which can be asked for one layer at a time only (for the 52 that 13
    groups of 3 layers and their proposals make, 16 images, 0.17 s on a CPU, here 0.008 s), waits for the device in
    each, and gives inf or NaN where float32 takes a sigmoid for 0 or 1.

    Attributes:
        score_exponent: a in the target.
    """

    score_exponent: float = 0.25

    def class_loss(self, logits: torch.Tensor, classes: torch.Tensor, holds_object: torch.Tensor) -> torch.Tensor:
        """Of all classes but those of the queries' objects, which `losses` adds."""
        others = torch.ones_like(logits).scatter(-1, classes[..., None], 1 - holds_object[..., None].to(logits.dtype))
        return (others * logits.sigmoid().square() * nn.functional.softplus(logits)).sum(dim=(1, 2, 3))

    def losses(self, group: GroupOutput, targets: Targets, assignment: torch.Tensor, *args) -> dict[str, torch.Tensor]:
        terms = super().losses(group, targets, assignment, *args)
        if targets.class_labels.shape[1] == 0:  # no object in the whole batch
            return terms
        logits, predicted, index = wide(group.logits), wide(group.boxes).detach(), assignment.clamp(min=0)
        classes = targets.class_labels.expand(len(index), -1, -1).gather(-1, index)
        objects = targets.boxes.to(predicted.dtype).expand(len(index), -1, -1, -1)
        overlap = iou(predicted, objects.take_along_dim(index[..., None], dim=2))
        held = logits.take_along_dim(classes[..., None], dim=-1).squeeze(-1)
        target = held.detach().sigmoid() ** self.score_exponent * overlap ** (1 - self.score_exponent)
        entropy = nn.functional.binary_cross_entropy_with_logits(
            held, target.clamp(min=LEAST_TARGET), reduction="none"
        )
        return terms | {"class": terms["class"] + ((assignment != NO_OBJECT) * entropy).sum(dim=(1, 2))}
