"""Hungarian label assignment of Conditional DETR: which query answers for which ground-truth object."""

from dataclasses import dataclass

import torch
from torch import nn

from d3etr_hf.matching.boxes import generalised_iou
from d3etr_hf.matching.solver import assign, wide
from d3etr_hf.models.outputs import QueryGroupOutput

NO_OBJECT = -1


@dataclass(frozen=True)
class Targets:
    """The ground truth of a batch, padded to the image with most objects.

    Attributes:
        class_labels: int64 `(B, T)`, 0 where there is no object.
        boxes: `(B, T, 4)`, cxcywh in 0..1 of the unpadded image; the whole image where there is no object.
        counts: objects per image.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    counts: list[int]

    @classmethod
    def from_labels(cls, labels: list[dict[str, torch.Tensor]]) -> "Targets":
        """Pad what the collator hands over: per image `class_labels` int64 `(n,)` and `boxes` `(n, 4)` cxcywh 0..1."""
        pad = nn.utils.rnn.pad_sequence
        classes = pad([label["class_labels"] for label in labels], batch_first=True)
        boxes = pad([label["boxes"] for label in labels], batch_first=True)
        counts = [len(label["class_labels"]) for label in labels]
        lengths = torch.tensor(counts, device=boxes.device)
        padding = torch.arange(boxes.shape[1], device=boxes.device) >= lengths[:, None]
        whole_image = boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
        return cls(classes, torch.where(padding[..., None], whole_image, boxes), counts)


@dataclass(frozen=True)
class HungarianAssigner:
    """Minimum-cost assignment of ground-truth objects to queries, per image and per layer.

    cost = class_weight * (focal loss as object - focal loss as background) + l1_weight * L1 - giou_weight * GIoU

    Attributes:
        class_weight, l1_weight, giou_weight: 2, 5, 2 in the paper.
        focal_alpha, focal_gamma: of the focal loss (Lin et al., ICCV 2017).
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, group: QueryGroupOutput, targets: Targets, whose: str = "student") -> torch.Tensor:
        """Assign in every layer.

        Args:
            group: the predictions, logits `(L, B, N, C)` and boxes `(L, B, N, 4)`.
            targets: the ground truth.
            whose: the group's name, for the error.

        Returns:
            int64 `(L, B, N)`: the object of each query, `NO_OBJECT` where there is none.

        Raises:
            NonFiniteCostError: a prediction is NaN or infinite.
        """
        logits, boxes = wide(group.logits), wide(group.boxes)
        assignment = torch.full(logits.shape[:3], NO_OBJECT)
        if not any(targets.counts):
            return assignment.to(logits.device)
        cost = self._cost(logits, boxes, targets)
        for layer, images in enumerate(assign(cost, f"ground truth to {whose} queries", targets.counts)):
            for image, (queries, objects) in enumerate(images):
                assignment[layer, image, torch.from_numpy(queries)] = torch.from_numpy(objects)
        return assignment.to(logits.device)

    def _cost(self, logits: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> torch.Tensor:
        """`(L, B, N, T)`."""
        scores = logits.sigmoid()
        background = (1 - self.focal_alpha) * scores**self.focal_gamma * -(1 - scores + 1e-8).log()
        as_object = self.focal_alpha * (1 - scores) ** self.focal_gamma * -(scores + 1e-8).log()
        index = targets.class_labels[None, :, None, :].expand(*logits.shape[:3], -1)
        class_cost = (as_object - background).gather(-1, index)
        target_boxes = wide(targets.boxes).to(boxes.dtype)
        l1_cost = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1, -1), p=1)
        giou = generalised_iou(boxes[..., :, None, :], target_boxes[:, None])
        return self.class_weight * class_cost + self.l1_weight * l1_cost - self.giou_weight * giou
