"""The detection criterion of families whose boxes come from distributions over the distances of their edges."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from d3etr_hf.losses.detection_loss import BOX_TERMS
from d3etr_hf.losses.overlap_criteria import VarifocalCriterion
from d3etr_hf.matching import Problem
from d3etr_hf.outputs import NO_OBJECT, GroupOutput, Targets, wide


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
        module: `DFineLoss` of Transformers, or its heir; asked for the loss of a single object it returns a sum.
        fgl_weight, ddf_weight: weights of these losses.
        shared_queries: names of predictions that share their queries; () for no unions.
    """

    module: Any = field(default=None, compare=False)
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
        pairs = pairs_of(assignment if box_assignment is None else box_assignment.expand_as(assignment))
        return terms | self._of_distributions(group, targets, pairs)

    def _of_distributions(self, group: GroupOutput, targets: Targets, pairs: list) -> dict[str, torch.Tensor]:
        """ "fgl" and "ddf" of every layer, by Transformers' module; the assignment has been read on the host, once."""
        module, images = self.module.to(group.boxes.device), len(group.boxes[0])
        labels = [
            {"class_labels": classes[:count], "boxes": boxes[:count].to(group.boxes.dtype)}
            for classes, boxes, count in zip(targets.class_labels, targets.boxes, targets.counts, strict=True)
        ]
        found = []
        for layer, chosen in enumerate(pairs):
            outputs = {
                "logits": wide(group.logits[layer]),
                "pred_boxes": group.boxes[layer],
                "pred_corners": wide(group.box_distribution[layer]).flatten(2),
                "ref_points": wide(group.box_reference),
                "teacher_corners": wide(group.box_distribution[-1]).flatten(2),
                "teacher_logits": wide(group.logits[-1]),
            }
            found.append(module.get_loss("local", outputs, labels, chosen, 1))
        queries = images * group.boxes.shape[2]
        return {
            "fgl": torch.stack([values["loss_fgl"] for values in found]),
            "ddf": torch.stack([values["loss_ddf"] for values in found]) * queries,
        }


def pairs_of(assignment: torch.Tensor) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Layer by layer and image by image the queries that hold an object, and their objects, int64 on the host.

    Args:
        assignment: int64 `(L, B, N)`, the object of each query or `NO_OBJECT`.
    """
    layers = []
    for layer in assignment.cpu():
        held = [(image != NO_OBJECT).nonzero().squeeze(1) for image in layer]
        layers.append([(queries, image[queries]) for queries, image in zip(held, layer, strict=True)])
    return layers


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
