"""Detection criteria whose class loss asks how well the box fits: its targets or weights are made of IoU.

Transformers' loss modules hold the same formulas. They can be asked for one layer at a time only, wait for the device
several times in each, and divide as they please: for the 52 layers that 13 groups of 3 and their proposals make, 16
images, 0.17 s on a CPU, here 0.008 s. Each criterion is tested to equal its module, term by term.
"""

from dataclasses import dataclass

import torch
from torch import nn

from d3etr_hf.losses.detection_loss import FocalCriterion

# the least target of a query that holds an object, in `IouAwareCriterion`
LEAST_TARGET = 0.01


@dataclass(frozen=True)
class VarifocalCriterion(FocalCriterion):
    """RT-DETR's and D-FINE's: varifocal loss (Zhang et al., CVPR 2021). DEIM's matching-aware loss is another setting.

    Binary cross-entropy of all classes. For the class of a query's object the target is IoU^e and the weight IoU, or
    one; elsewhere the target is zero and the weight a * score^g. Costs are the focal ones.

    Attributes:
        background_alpha, background_gamma: a and g.
        target_exponent: e.
        weighs_overlap: whether an object's weight is its IoU; else it is one.
    """

    background_alpha: float = 0.75
    background_gamma: float = 2.0
    target_exponent: float = 1.0
    weighs_overlap: bool = True

    def class_loss(
        self, logits: torch.Tensor, classes: torch.Tensor, holds_object: torch.Tensor, overlap: torch.Tensor
    ) -> torch.Tensor:
        held, nothing, place = holds_object.to(logits.dtype), torch.zeros_like(logits), classes[..., None]
        one_hot = nothing.scatter(-1, place, held[..., None])
        overlap = overlap.to(logits.dtype)
        target = nothing.scatter(-1, place, (held * overlap**self.target_exponent)[..., None])
        weight = nothing.scatter(-1, place, (held * overlap)[..., None]) if self.weighs_overlap else one_hot
        scores = logits.detach().sigmoid()
        weight = weight + self.background_alpha * scores**self.background_gamma * (1 - one_hot)
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (weight * entropy).sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class IouAwareCriterion(FocalCriterion):
    """LW-DETR's (Chen et al., 2024): binary cross-entropy of a query's score for the class of its object with the
    target score^a IoU^(1 - a), and of its other scores with zero, weighted by their squares. Costs are the focal ones.

    Transformers' module gives inf or NaN where float32 takes a sigmoid for 0 or 1; this does not.

    Attributes:
        score_exponent: a in the target.
    """

    score_exponent: float = 0.25

    def class_loss(
        self, logits: torch.Tensor, classes: torch.Tensor, holds_object: torch.Tensor, overlap: torch.Tensor
    ) -> torch.Tensor:
        held, place = holds_object.to(logits.dtype), classes[..., None]
        others = torch.ones_like(logits).scatter(-1, place, 1 - held[..., None])
        background = (others * logits.sigmoid().square() * nn.functional.softplus(logits)).sum(dim=(1, 2, 3))
        of_object = logits.take_along_dim(place, dim=-1).squeeze(-1)
        target = of_object.detach().sigmoid() ** self.score_exponent * overlap ** (1 - self.score_exponent)
        target = target.clamp(min=LEAST_TARGET)
        entropy = nn.functional.binary_cross_entropy_with_logits(of_object, target, reduction="none")
        return background + (held * entropy).sum(dim=(1, 2))
