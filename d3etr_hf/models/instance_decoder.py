"""ICD's conditional decoder (Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS
2021): of the teacher's memory alone it learns where that says what of an object, and there the student shall follow.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from d3etr_hf.models.memory_adapters import ComparesMemory
from d3etr_hf.outputs import ComparedLevel, DecodedInstances, Targets
from d3etr_hf.outputs.attention_maps import valid_sizes

FAKES = 5  # instances that are not there, for each that is
JITTER = 0.3  # how far an instance's described place may lie from its centre, as a share of its size
PLACE_FEATURES, SIZE_BINS = 128, 5  # of each of x and y, of each of width and height
NORM_EPSILON = 1e-4


class IcdAdapter(ComparesMemory):
    """Encoder of instances, attention to the teacher's memory, and predictor; a projection of the student's memory.

    An instance is described by its class, a place near its centre and its size; beside the objects of the image there
    are five fakes each, of the same class and size anywhere. The predictor tells from what the attention finds of the
    teacher which are there, and where their edges are. All levels are one sequence of S tokens.

    Args:
        width, their_width: hidden sizes of the student and of the teacher.
        levels: whatever number of levels the student's memory has.
        classes: number of the student's classes.
    """

    def __init__(self, width: int, their_width: int, levels: int, classes: int):
        super().__init__()
        self.classes, self.heads = classes, math.gcd(8, their_width)
        described = classes + 2 * PLACE_FEATURES + 2 * SIZE_BINS
        self.encoder = _perceptron(described, their_width, their_width)
        self.predictor = _perceptron(their_width, their_width, 5)
        self.place = nn.Linear(2 * PLACE_FEATURES, their_width)
        self.query, self.output = nn.Linear(their_width, their_width), nn.Linear(their_width, their_width)
        self.key = nn.Linear(their_width, their_width, bias=False)  # softmax knows no bias of keys
        self.value, self.norm = nn.Linear(their_width, their_width), nn.LayerNorm(their_width)
        self.student_value = nn.Linear(width, their_width)

    def forward(self, levels: Sequence[ComparedLevel], targets: Targets) -> DecodedInstances:
        """What is decoded of both memories; each of its parts learns from one loss alone."""
        theirs, ours = (
            torch.cat([part.flatten(2).mT for part in parts], dim=1)
            for parts in zip(*((level.teacher, level.student) for level in levels), strict=True)
        )
        mask = torch.cat([level.mask.flatten(1) for level in levels], dim=1)
        places = torch.cat([_places(level.mask) for level in levels], dim=1)
        description, real, there, place, edges = describe(targets, self.classes)
        instances = self.encoder(description.to(theirs.dtype))
        queries, keys = self._heads(self.query(instances)), self._heads(self.key(theirs + self.place(sine_of(places))))
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        attention = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        values = self._heads(self.value(theirs))
        found = (attention @ values).transpose(1, 2).flatten(2)
        said = self.predictor(self.norm(instances + self.output(found)))
        return DecodedInstances(
            attention=attention.detach(),
            teacher_values=_normed(values).detach(),
            student_values=_normed(self._heads(self.student_value(ours))),
            confidence=said[..., 0],
            edges=said[..., 1:].sigmoid(),
            target_edges=edges,
            real=real,
            there=there,
        )

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, N, d)` to `(B, M, N, d / M)`."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@torch.no_grad()
def describe(targets: Targets, classes: int) -> tuple[torch.Tensor, ...]:
    """Instances of each image, the objects first and then their fakes, drawn afresh: K = 6 T of them, 6 at least.

    Returns:
        Descriptions `(B, K, classes + 266)`; bool `(B, K)`, whether each is real, and whether there is one at all; the
        described places `(B, K, 2)`, in 0..1; and from there the distances of left, top, right and bottom edge,
        `(B, K, 4)`.
    """
    targets = targets.with_a_place()  # parameters have a gradient all the same
    labels, boxes, objects = targets.class_labels, targets.boxes, targets.present
    count = boxes.shape[1]
    there, labels, boxes = objects.repeat(1, 1 + FAKES), labels.repeat(1, 1 + FAKES), boxes.repeat(1, 1 + FAKES, 1)
    real = there & (torch.arange(boxes.shape[1], device=boxes.device) < count)
    centre, size = boxes[..., :2], boxes[..., 2:]
    centre = torch.where(real[..., None], centre, torch.rand_like(centre))
    place = centre + size * JITTER * (2 * torch.rand_like(centre) - 1)
    edges = torch.cat([place - (centre - size / 2), centre + size / 2 - place], dim=-1)
    bins = (size.clamp(min=1e-6).log2() + SIZE_BINS).floor().clamp(0, SIZE_BINS - 1).long()
    parts = [nn.functional.one_hot(labels, classes), sine_of(place), nn.functional.one_hot(bins, SIZE_BINS).flatten(2)]
    return torch.cat([part.to(boxes.dtype) for part in parts], dim=-1), real, there, place, edges


def sine_of(places: torch.Tensor) -> torch.Tensor:
    """Places `(..., 2)` in 0..1 as sines and cosines of 64 frequencies each, `(..., 256)`."""
    step = torch.arange(PLACE_FEATURES // 2, device=places.device, dtype=places.dtype)
    angles = 2 * math.pi * places[..., None] / 10000 ** (2 * step / PLACE_FEATURES)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Centres of cells, x and y in 0..1 of the unpadded image, `(B, H*W, 2)`, of a level's mask `(B, H, W)`."""
    rows, columns = valid_sizes(mask)
    y, x = torch.meshgrid(*(torch.arange(size, device=mask.device) + 0.5 for size in mask.shape[1:]), indexing="ij")
    return torch.stack([x.flatten() / columns[:, None], y.flatten() / rows[:, None]], dim=-1)


def _normed(values: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(values, values.shape[-1:], eps=NORM_EPSILON)


def _perceptron(width: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)
