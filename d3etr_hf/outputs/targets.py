"""The ground truth of a batch as tensors of one shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_OBJECT = -1


@dataclass(frozen=True)
class Targets:
    """The ground truth of a batch, padded to the image with most objects.

    Attributes:
        class_labels: int64 `(B, T)`, 0 where there is no object.
        boxes: `(B, T, 4)`, cxcywh in 0..1 of the unpadded image; the whole image where there is no object.
        counts: objects per image.
        labeled: whether each image has ground truth at all: one without is no image without objects. None: all have.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    counts: list[int]
    labeled: list[bool] | None = None

    def repeated(self, times: int) -> "Targets":
        """Every object so many times, one after the other."""
        return Targets(
            self.class_labels.repeat_interleave(times, dim=1),
            self.boxes.repeat_interleave(times, dim=1),
            [times * count for count in self.counts],
            self.labeled,
        )

    @property
    def present(self) -> torch.Tensor:
        """bool `(B, T)`, which places hold an object."""
        counts = torch.tensor(self.counts, device=self.boxes.device)
        return torch.arange(self.boxes.shape[1], device=self.boxes.device) < counts[:, None]

    @property
    def visible(self) -> torch.Tensor:
        """bool `(B, 1, 1, T)`, whom queries made of these may see: objects, or in an image without any every place."""
        present = self.present
        return (present | ~present.any(-1, keepdim=True))[:, None, None]

    def with_a_place(self) -> "Targets":
        """The same with T of at least 1: in a batch without an object an empty place an image."""
        if self.boxes.shape[1] > 0:
            return self
        whole = self.boxes.new_tensor([0.5, 0.5, 1, 1]).expand(len(self.boxes), 1, 4)
        return Targets(self.class_labels.new_zeros(len(whole), 1), whole, self.counts, self.labeled)

    def of_images(self, images: Sequence[int]) -> "Targets":
        """Those of some images of the batch, which count as images with ground truth."""
        rows = torch.tensor(images, device=self.boxes.device)
        return Targets(self.class_labels[rows], self.boxes[rows], [self.counts[image] for image in images])

    @classmethod
    def from_packed(
        cls, packed: torch.Tensor, counts: Sequence[int], labeled: Sequence[bool] | None = None
    ) -> "Targets":
        """From what `pack` made, wherever it has been moved since."""
        all_labeled = labeled is None or all(labeled)
        return cls(packed[..., 0].long(), packed[..., 1:], list(counts), None if all_labeled else list(labeled))


def pack(labels: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """One tensor for the ground truth of a batch, so that it moves to a device in one copy.

    Args:
        labels: per image `class_labels` int64 `(n,)` and `boxes` `(n, 4)` cxcywh in 0..1.

    Returns:
        float32 `(B, T, 5)`: class label and box; class 0 and the whole image where there is no object.
    """
    most = max(len(label["class_labels"]) for label in labels)
    packed = torch.tensor([0, 0.5, 0.5, 1, 1]).repeat(len(labels), most, 1)
    for row, label in zip(packed, labels, strict=True):
        count = len(label["class_labels"])
        row[:count, 0] = label["class_labels"]
        row[:count, 1:] = label["boxes"]
    return packed
