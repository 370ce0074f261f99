"""Denoising queries for students whose family has none: ground truth with noise, which the decoder takes off again.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022. Every object makes one query
in each of P groups: its content is a learned embedding of its class, which is another with probability gamma, and its
anchor is its box with the centre moved by up to lambda w / 2 and lambda h / 2 and each side scaled by 1 - lambda to
1 + lambda. The detection loss asks each query for its own object, and is divided by P times the objects. Groups see
themselves alone (the authors find no difference where they see the student's queries).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d3etr_hf.data.sampling import Draw, mixed
from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.models.detector import Detector
from d3etr_hf.outputs import NO_OBJECT, DetectorOutput, GroupOutput, Queries, Supervised, Targets
from d3etr_hf.training.distillation import Distillation

NOISED = "noised_queries"
# a logit that no class loss and no gradient come of
NO_CLASS = -1e4


def check_denoising(student: Detector, options: Distillation) -> None:
    """Refuse a student whose queries have no anchors that noise could be put on.

    Raises:
        UnsupportedOptionError: the message names its family.
    """
    if options.denoising_groups > 0 and student.anchor_size == 0:
        raise UnsupportedOptionError(
            f"denoising_groups={options.denoising_groups}: queries of the student, a {student.title}, have no anchors "
            "that could be boxes with noise; set it to 0"
        )


@dataclass(frozen=True)
class NoisedQueries:
    """The denoising queries of a batch, T a group and image, of which an image with fewer objects uses the first.

    Attributes:
        queries: by the group's name: class numbers `(B, T, 1)` as content, and anchors `(B, T, 4)`, cxcywh in 0..1.
        masks: by the group's name bool `(B, 1, 1, T)`, which queries may be seen.
        assignment: int64 `(B, T)`, the object of each, `NO_OBJECT` for those that are not used.
    """

    queries: dict[str, Queries]
    masks: dict[str, torch.Tensor]
    assignment: torch.Tensor

    def supervise(self, student: DetectorOutput) -> None:
        """Turn these groups of the output into one that ground truth alone supervises, in place."""
        groups = [student.groups.pop(name) for name in self.queries]
        unused = (self.assignment == NO_OBJECT)[..., None]
        joined = GroupOutput(
            logits=torch.cat([group.logits.masked_fill(unused, NO_CLASS) for group in groups], dim=2),
            boxes=torch.cat([group.boxes for group in groups], dim=2),
        )
        assignment = self.assignment.repeat(1, len(groups)).expand(len(joined.boxes), -1, -1)
        found = Supervised(assignment, joined, repeats=len(groups))
        student.supervised = (student.supervised or {}) | {NOISED: found}


def noised_queries(
    targets: Targets, image_ids: Sequence[int], classes: int, options: Distillation, seed: int, step: int
) -> NoisedQueries:
    """What is drawn for an image is known from the run's seed, the step and its id, whatever else is in its batch.

    Args:
        targets: the ground truth of the batch.
        image_ids: of its images.
        classes: C, how many there are.
        step: the optimizer step, from 0.
    """
    targets = targets.with_a_place()  # one that is not used, so that all that learns has a gradient
    batch, most = len(targets.counts), targets.boxes.shape[1]
    noise = torch.zeros(options.denoising_groups, batch, most, 6)
    for image, (image_id, count) in enumerate(zip(image_ids, targets.counts, strict=False)):
        generator = torch.Generator().manual_seed(mixed(seed, step, image_id, Draw.DENOISING))
        noise[:, image, :count] = torch.rand(options.denoising_groups, count, 6, generator=generator)
    boxes, labels = targets.boxes, targets.class_labels
    noise = noise.to(boxes.device)
    places = torch.arange(most, device=boxes.device).expand(batch, -1)
    queries = {}
    for number, drawn in enumerate(noise, 1):
        content = _other_labels(labels, drawn[..., 4:], classes, options.denoising_label_noise)
        anchors = _moved(boxes, drawn[..., :4], options.denoising_box_noise)
        queries[f"{NOISED}_{number}"] = Queries(content=content[..., None], anchors=anchors)
    assignment = torch.where(targets.present, places, NO_OBJECT)
    return NoisedQueries(queries, dict.fromkeys(queries, targets.visible), assignment)


def _moved(boxes: torch.Tensor, drawn: torch.Tensor, scale: float) -> torch.Tensor:
    """Boxes `(B, T, 4)` by numbers of 0..1 `(B, T, 4)`: two move the centre, two scale the sides."""
    noise = (2 * drawn.to(boxes.dtype) - 1) * scale
    centre = boxes[..., :2] + noise[..., :2] * boxes[..., 2:] / 2
    return torch.cat([centre, boxes[..., 2:] * (1 + noise[..., 2:])], dim=-1).clamp(0, 1)


def _other_labels(labels: torch.Tensor, drawn: torch.Tensor, classes: int, share: float) -> torch.Tensor:
    """Classes `(B, T)`, that share of them drawn anew from all: whether and which by numbers of 0..1, `(B, T, 2)`."""
    whether, which = drawn.unbind(-1)
    return torch.where(whether < share, (which * classes).long().clamp(max=classes - 1), labels)
