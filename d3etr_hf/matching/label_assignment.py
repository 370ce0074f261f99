"""Label assignment: which query answers for which ground-truth object."""

from collections.abc import Callable

import torch

from d3etr_hf.matching.solver import Problem, Solution
from d3etr_hf.outputs import NO_OBJECT, Targets, wide
from d3etr_hf.outputs.boxes import generalised_iou

# (probabilities (L, B, N, C), class labels (B, T)) to (L, B, N, T)
ClassCost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def assignment_problem(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    targets: Targets,
    class_cost: ClassCost,
    weights: tuple[float, float, float],
    whose: str,
) -> Problem:
    """The minimum-cost assignment of ground-truth objects to queries, per image and layer, to be solved.

    cost = class * class_cost + l1 * L1 - giou * GIoU

    Args:
        probabilities: `(L, B, N, C)` class probabilities of objects.
        boxes: `(L, B, N, 4)`, cxcywh in 0..1.
        targets: the ground truth.
        class_cost: the family's.
        weights: of the class cost, L1 and GIoU.
        whose: the group's name, for the error.
    """
    probabilities, boxes = wide(probabilities), wide(boxes)
    target_boxes = wide(targets.boxes).to(boxes.dtype)
    with torch.autocast(boxes.device.type, enabled=False):
        l1_cost = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1, -1), p=1)
        giou = generalised_iou(boxes[..., :, None, :], target_boxes[:, None])
        cost = weights[0] * class_cost(probabilities, targets.class_labels) + weights[1] * l1_cost - weights[2] * giou
    return Problem(cost, f"ground truth to {whose} queries", targets.counts)


def assignment_of(solution: Solution, queries: int) -> torch.Tensor:
    """int64 `(L, B, N)`: the object of each of N queries, `NO_OBJECT` where there is none."""
    rows, columns = solution.rows, solution.columns
    # pairs that an image with fewer objects lacks have row -1: they go to a place beyond the last query
    places = torch.where(rows < 0, queries, rows)
    assignment = columns.new_full((*rows.shape[:2], queries + 1), NO_OBJECT)
    return assignment.scatter_(2, places, columns)[..., :queries]


def probabilities_of(probabilities: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    """The probability that each query gives to each object's class.

    Args:
        probabilities: `(L, B, N, C)`.
        class_labels: int64 `(B, T)`.

    Returns:
        `(L, B, N, T)`.
    """
    index = class_labels[None, :, None, :].expand(*probabilities.shape[:3], -1)
    return probabilities.gather(-1, index)
