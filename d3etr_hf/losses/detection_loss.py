"""Detection criteria: a family's label assignment and detection loss, for all layers at once and any assignment.

A criterion's losses are sums; what they are divided by is counted over the whole optimizer step (all processes, all
accumulated batches) before the forward pass, so that processes and batches add up to one mean. That is why the
formulas stand here and not in a call of Transformers' loss module, which divides one batch on one process (and by the
world size once too often).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from d3etr_hf.matching import Problem, assignment_of, assignment_problem, probabilities_of, solve
from d3etr_hf.outputs import NO_OBJECT, GroupOutput, Scores, SigmoidScores, SoftmaxScores, Targets, wide
from d3etr_hf.outputs.boxes import generalised_iou, iou

BOX_TERMS = ("l1", "giou")
TERMS = ("class", *BOX_TERMS)


@dataclass(frozen=True)
class DetectionCriterion(ABC):
    """Hungarian assignment, a class loss, L1 and GIoU losses.

    Attributes:
        class_cost, l1_cost, giou_cost: weights in the assignment.
        class_weight, l1_weight, giou_weight: weights of the losses.
    """

    class_cost: float
    l1_cost: float
    giou_cost: float
    class_weight: float
    l1_weight: float
    giou_weight: float

    @property
    @abstractmethod
    def scores(self) -> Scores:
        """How class logits are read."""

    @abstractmethod
    def class_costs(self, probabilities: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Class cost of each query and object: `(L, B, N, C)` and int64 `(B, T)` to `(L, B, N, T)`."""

    @abstractmethod
    def class_loss(
        self, logits: torch.Tensor, classes: torch.Tensor, holds_object: torch.Tensor, overlap: torch.Tensor
    ) -> torch.Tensor:
        """Class loss of each layer, a sum over images and queries.

        Args:
            logits: `(L, B, N, ·)`.
            classes: int64 `(L, B, N)`, the class of each query's object; any where there is none.
            holds_object: bool `(L, B, N)`.
            overlap: `(L, B, N)`, IoU of each query's box with its object, without gradient; any where there is none.

        Returns:
            `(L,)`.
        """

    def normalisers(self, objects: torch.Tensor, held: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each term's sum is divided by: linear in its arguments, so that batches and processes add up.

        Args:
            objects: ground-truth objects of the whole step (divided, as all three, by the number of processes).
            held: those of them that find a query: no image has more than its queries.
            queries: queries of all images of the step.
        """
        return dict.fromkeys(TERMS, objects)

    def box_assignments(self, assignments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The assignments that the losses of boxes take instead, where a family has such.

        Args:
            assignments: by name, of groups and of what only ground truth supervises, int64 `(L, B, N)`: what ground
                truth was assigned to by its cost.

        Returns:
            By name int64 `(B, N)`, the same for all layers; `box_terms` are then divided by its pairs.
        """
        return {}

    @property
    def box_terms(self) -> tuple[str, ...]:
        """The terms that `box_assignments` are of, a mean over pairs each."""
        return BOX_TERMS

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        return dict(zip(TERMS, (self.class_weight, self.l1_weight, self.giou_weight), strict=True))

    def problem(self, probabilities: torch.Tensor, boxes: torch.Tensor, targets: Targets, whose: str) -> Problem:
        """The assignment of ground truth to queries, to be solved together with others; see `assignment_problem`."""
        costs = self.class_cost, self.l1_cost, self.giou_cost
        return assignment_problem(probabilities, boxes, targets, self.class_costs, costs, whose)

    def assign(self, group: GroupOutput, targets: Targets, whose: str = "student") -> torch.Tensor:
        """int64 `(L, B, N)`: the object of each query, `NO_OBJECT` where there is none.

        Raises:
            NonFiniteCostError: a prediction is NaN or infinite.
        """
        problem = self.problem(self.scores.probabilities(group.logits), group.boxes, targets, whose)
        return assignment_of(solve(problem), group.boxes.shape[2])

    def losses(
        self,
        group: GroupOutput,
        targets: Targets,
        assignment: torch.Tensor,
        box_assignment: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The class loss of all queries, L1 and GIoU losses of those that hold an object.

        Args:
            group: logits `(L, B, N, ·)`, boxes `(L, B, N, 4)` cxcywh in 0..1.
            targets: the ground truth.
            assignment: int64 `(L, B, N)`, the object of each query or `NO_OBJECT`.
            box_assignment: likewise, that of the losses of boxes; None: the same.

        Returns:
            "class", "l1" and "giou", unweighted sums, `(L,)` each.
        """
        logits, predicted = wide(group.logits), wide(group.boxes)
        box_assignment = assignment if box_assignment is None else box_assignment
        if targets.class_labels.shape[1] == 0:  # no object in the whole batch: nothing to gather from
            classes = torch.zeros_like(assignment)
            held_boxes = boxes = torch.full_like(predicted, 0.5)
        else:
            classes = targets.class_labels.expand(len(assignment), -1, -1).gather(-1, assignment.clamp(min=0))
            all_boxes = targets.boxes.to(predicted.dtype).expand(len(assignment), -1, -1, -1)
            held_boxes, boxes = (
                all_boxes.take_along_dim(objects.clamp(min=0)[..., None], dim=2)
                for objects in (assignment, box_assignment)
            )
        share = (box_assignment != NO_OBJECT).to(predicted.dtype)
        return {
            "class": self.class_loss(logits, classes, assignment != NO_OBJECT, iou(predicted.detach(), held_boxes)),
            "l1": (share * (predicted - boxes).abs().sum(-1)).sum(dim=(1, 2)),
            "giou": (share * (1 - generalised_iou(predicted, boxes))).sum(dim=(1, 2)),
        }


@dataclass(frozen=True)
class FocalCriterion(DetectionCriterion):
    """Conditional DETR's: focal loss (Lin et al., ICCV 2017) over all queries and classes, divided by the objects.

    Attributes:
        alpha, gamma: of the focal loss.
        cost_alpha, cost_gamma: of the same in costs, which the authors do not set by those of the loss.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    cost_alpha: float = 0.25
    cost_gamma: float = 2.0

    @property
    def scores(self) -> Scores:
        return SigmoidScores()

    def class_costs(self, probabilities: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        scores = probabilities_of(probabilities, class_labels)
        background = (1 - self.cost_alpha) * scores**self.cost_gamma * -(1 - scores + 1e-8).log()
        as_object = self.cost_alpha * (1 - scores) ** self.cost_gamma * -(scores + 1e-8).log()
        return as_object - background

    def class_loss(
        self, logits: torch.Tensor, classes: torch.Tensor, holds_object: torch.Tensor, overlap: torch.Tensor
    ) -> torch.Tensor:
        held = holds_object[..., None].to(logits.dtype)
        one_hot = torch.zeros_like(logits).scatter(-1, classes[..., None], held)
        scores = logits.sigmoid()
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        missed = one_hot * (1 - scores) + (1 - one_hot) * scores
        alpha = self.alpha * one_hot + (1 - self.alpha) * (1 - one_hot)
        return (alpha * missed**self.gamma * entropy).sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class CrossEntropyCriterion(DetectionCriterion):
    """DETR's (Carion et al., ECCV 2020): cross-entropy with a lighter no-object class, a mean weighted by class.

    Attributes:
        no_object_weight: weight of a query without an object; one with an object weighs 1.
    """

    no_object_weight: float = 0.1

    @property
    def scores(self) -> Scores:
        return SoftmaxScores()

    def class_costs(self, probabilities: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return -probabilities_of(probabilities, class_labels)

    def class_loss(
        self, logits: torch.Tensor, classes: torch.Tensor, holds_object: torch.Tensor, overlap: torch.Tensor
    ) -> torch.Tensor:
        target = torch.where(holds_object, classes, logits.shape[-1] - 1)
        entropy = -logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
        return (torch.where(holds_object, 1.0, self.no_object_weight) * entropy).sum(dim=(1, 2))

    def normalisers(self, objects: torch.Tensor, held: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().normalisers(objects, held, queries) | {"class": held + self.no_object_weight * (queries - held)}
