"""Detection criteria that ask a loss module of Transformers, for the layers and the assignment given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from d3etr_hf.losses.detection_loss import FocalCriterion
from d3etr_hf.outputs import NO_OBJECT, GroupOutput, Targets, wide

# what Transformers' modules call the losses of boxes
OF_BOXES = ("boxes", "local")


@dataclass(frozen=True)
class StockCriterion(FocalCriterion):
    """A family's own detection loss: what its module in `transformers.loss` sums, divided by the whole step's counts.

    The module divides by the objects of one batch on one process, each family's in a way of its own. Asked for the
    loss of a single object, it returns the sum, and the sums of all processes and batches add up.

    Attributes:
        module: the loss module, one object of `transformers.loss`; its own matcher is not used.
        losses_of: what it calls the losses that are asked for, such as ("vfl", "boxes").
        names: what it calls our terms, such as {"class": "loss_vfl", "l1": "loss_bbox", "giou": "loss_giou"}.
    """

    module: Any = field(default=None, compare=False)
    losses_of: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def losses(
        self,
        group: GroupOutput,
        targets: Targets,
        assignment: torch.Tensor,
        box_assignment: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """As in `DetectionCriterion`; each assignment is read on the host, once."""
        labels = [
            {"class_labels": classes[:count], "boxes": boxes[:count].to(group.boxes.dtype)}
            for classes, boxes, count in zip(targets.class_labels, targets.boxes, targets.counts, strict=True)
        ]
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        pairs = pairs_of(assignment)
        box_pairs = pairs if box_assignment is None else pairs_of(box_assignment)
        for layer in range(len(assignment)):
            outputs = self.outputs_of(group, layer)
            values: dict[str, torch.Tensor] = {}
            for loss in self.losses_of:
                chosen = box_pairs if loss in OF_BOXES else pairs
                values |= self.module.get_loss(loss, outputs, labels, chosen[layer], 1)
            for name, stock_name in self.names.items():
                if stock_name in values:
                    found[name].append(values[stock_name])
        return {name: torch.stack(layers) for name, layers in found.items() if layers}

    def outputs_of(self, group: GroupOutput, layer: int) -> dict[str, torch.Tensor]:
        """One layer's predictions under the names that the module reads."""
        return {"logits": wide(group.logits[layer]), "pred_boxes": wide(group.boxes[layer])}


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
