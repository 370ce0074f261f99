"""The detection criterion of families whose boxes come from distributions over the distances of their edges."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from d3etr_hf.losses.detection_loss import BOX_TERMS
from d3etr_hf.losses.overlap_criteria import VarifocalCriterion
from d3etr_hf.matching import Problem
from d3etr_hf.outputs import NO_OBJECT, GroupOutput, Targets, wide
from d3etr_hf.outputs.boxes import iou

# of self-distillation
TEMPERATURE = 5.0


@dataclass(frozen=True)
class DistributionCriterion(VarifocalCriterion):
    """D-FINE's (Peng et al., ICLR 2025): fine-grained localisation, and each layer's distillation from the last.

    Terms beside "class", "l1" and "giou", for predictions with a box distribution: "fgl", a sum over pairs, and "ddf",
    which is a mean over one batch that cannot be added up: it comes times the batch's queries, so that divided by the
    queries of the whole step it is the mean of the batches' values, weighted by their images.

    As the authors train, losses of boxes take the union of the assignments of all predictions that share queries: each
    query that any of them gives an object takes the one that most of them give it. Boxes are clipped to the image, as
    in Transformers.

    Attributes:
        fgl_weight, ddf_weight: weights of these losses.
        shared_queries: names of predictions that share their queries; () for no unions.
    """

    fgl_weight: float = 0.0
    ddf_weight: float = 0.0
    shared_queries: tuple[tuple[str, ...], ...] = ()

    @property
    def weights(self) -> dict[str, float]:
        return super().weights | {"fgl": self.fgl_weight, "ddf": self.ddf_weight}

    @property
    def box_terms(self) -> tuple[str, ...]:
        return (*BOX_TERMS, "fgl")

    def normalisers(self, objects: torch.Tensor, held: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().normalisers(objects, held, queries) | {"fgl": objects, "ddf": queries}

    def problem(self, probabilities: torch.Tensor, boxes: torch.Tensor, targets: Targets, whose: str) -> Problem:
        return super().problem(probabilities, boxes.clamp(0, 1), targets, whose)

    def box_assignments(self, assignments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for names in self.shared_queries:
            given = [name for name in names if name in assignments]
            if given:
                union = union_of(torch.cat([assignments[name] for name in given]))
                found |= dict.fromkeys(given, union)
        return found

    def losses(
        self,
        group: GroupOutput,
        targets: Targets,
        assignment: torch.Tensor,
        box_assignment: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        group = replace(group, boxes=wide(group.boxes).clamp(0, 1))
        terms = super().losses(group, targets, assignment, box_assignment)
        if group.box_distribution is None:
            return terms
        box_assignment = assignment if box_assignment is None else box_assignment.expand_as(assignment)
        return terms | self._of_distributions(group, targets, box_assignment)

    @staticmethod
    def _of_distributions(group: GroupOutput, targets: Targets, assignment: torch.Tensor) -> dict[str, torch.Tensor]:
        """ "fgl" and "ddf" of every layer."""
        corners, holds_object = wide(group.box_distribution), assignment != NO_OBJECT
        if targets.class_labels.shape[1] == 0:  # no object in the whole batch: nothing to gather from
            objects, overlap = torch.full_like(group.boxes, 0.5), torch.zeros_like(group.boxes[..., 0])
        else:
            all_boxes = targets.boxes.to(group.boxes.dtype).expand(len(assignment), -1, -1, -1)
            objects = all_boxes.take_along_dim(assignment.clamp(min=0)[..., None], dim=2)
            overlap = iou(group.boxes.detach(), objects)
        distances = edge_distances(wide(group.box_reference), objects)
        located = localisation_loss(corners, distances, wide(group.box_bins)).sum(-1)
        confidence = wide(group.logits[-1]).detach().sigmoid().amax(-1)
        weights = torch.where(holds_object, overlap, confidence)
        queries = group.boxes[0, ..., 0].numel()
        return {
            "fgl": (holds_object * overlap * located).sum(dim=(1, 2)),
            "ddf": self_distillation(corners, weights, holds_object) * queries,
        }


def edge_distances(reference: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How far the edges of boxes lie outside those of the reference: left, top, right, bottom, in its sizes.

    Args:
        reference, boxes: `(B, N, 4)` and `(L, B, N, 4)`, cxcywh.

    Returns:
        `(L, B, N, 4)`.
    """
    centre, size = reference[..., :2], reference[..., 2:]
    near, far = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    return torch.cat([(centre - near) / size, (far - centre) / size], dim=-1) - 0.5


def localisation_loss(corners: torch.Tensor, distances: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each edge's distribution against the two bins around its distance, by how near they are.

    Fine-grained localisation without its weights (D-FINE, section 4.1).

    Args:
        corners: `(..., bins)` logits.
        distances: `(...)`; those beyond the bins count as the last one.
        bins: `(bins,)` their distances, ascending.

    Returns:
        `(...)`.
    """
    distances = distances.clamp(bins[0], bins[-1]).contiguous()
    left = (torch.searchsorted(bins, distances, right=True) - 1).clamp(0, len(bins) - 2)
    share = (distances - bins[left]) / (bins[left + 1] - bins[left])
    entropy = -corners.log_softmax(-1)
    found = [entropy.gather(-1, (left + step)[..., None]).squeeze(-1) for step in (0, 1)]
    return (1 - share) * found[0] + share * found[1]


def self_distillation(corners: torch.Tensor, weights: torch.Tensor, holds_object: torch.Tensor) -> torch.Tensor:
    """Each layer's distributions learn from the last layer's: a mean over one batch, zero for the last layer.

    Decoupled distillation focal loss (D-FINE, section 4.2): KL divergences at a temperature, their means over queries
    with and without an object weighed by the roots of how many there are.

    Args:
        corners: `(L, B, N, 4, bins)` logits.
        weights: `(L, B, N)`, of each query.
        holds_object: bool `(L, B, N)`.

    Returns:
        `(L,)`.
    """
    heated = corners / TEMPERATURE
    target = heated[-1].detach().log_softmax(-1)
    divergence = nn.functional.kl_div(
        heated.log_softmax(-1), target.expand_as(heated), reduction="none", log_target=True
    )
    edges = (TEMPERATURE**2 * weights[..., None] * divergence.sum(-1)).sum(-1)
    total = torch.zeros_like(edges[:, 0, 0])
    roots = torch.zeros_like(total)
    for chosen in (holds_object, ~holds_object):
        count = 4 * chosen.sum(dim=(1, 2))
        root = (count / corners.shape[1]).sqrt()
        total = total + root * (chosen * edges).sum(dim=(1, 2)) / count.clamp(min=1)
        roots = roots + root
    earlier = torch.arange(len(corners), device=corners.device) < len(corners) - 1
    return torch.where(earlier, total / roots, 0 * total)


def union_of(assignment: torch.Tensor) -> torch.Tensor:
    """The object that most layers give to each query, of several the first; `NO_OBJECT` where none gives one.

    Args:
        assignment: int64 `(L, B, N)`, the object of each query or `NO_OBJECT`.

    Returns:
        int64 `(B, N)`. Unlike in an assignment an object may belong to several queries.
    """
    none = assignment == NO_OBJECT
    votes = (assignment[:, None] == assignment).sum(1).masked_fill(none, 0)
    most = votes.amax(0)
    first = assignment.masked_fill(votes < most, torch.iinfo(assignment.dtype).max).amin(0)
    return torch.where(most > 0, first, NO_OBJECT)
