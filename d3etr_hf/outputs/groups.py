"""What every detector family hands to matching and losses: one type, whatever the model behind it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from d3etr_hf.outputs.attention_maps import AttentionMap, SampledAttention
from d3etr_hf.outputs.memory import ComparedLevel, DecodedInstances, MemoryLevel
from d3etr_hf.outputs.scores import wide
from d3etr_hf.outputs.targets import Targets

OWN, AUXILIARY = "own", "auxiliary"
# of one student in training; the authors of Group DETR take ten
MOST_AUXILIARY_GROUPS = 32
# queries that a teacher and its student are both given (KD-DETR, CLoCKDistill), of which no ground truth is asked
RANDOM_QUERIES, TEACHER_QUERIES, OBJECT_QUERIES = SHARED_GROUPS = (
    "random_queries",
    "teacher_queries",
    "object_queries",
)
# learned queries that ground truth is asked of several times (H-DETR)
ONE_TO_MANY = "one_to_many"


def auxiliary_names(count: int) -> tuple[str, ...]:
    """What so many auxiliary groups are called, the first of them `AUXILIARY`."""
    return tuple(AUXILIARY if number == 1 else f"{AUXILIARY}_{number}" for number in range(1, count + 1))


@dataclass(frozen=True)
class Queries:
    """The object queries of one group, as a decoder takes them. What a family does not have is None.

    Attributes:
        content: `(N, d)`, the same for every image, or `(B, N, d)`, those of one batch.
        position: `(N, d)` or `(B, N, d)`.
        anchors: `(N, A)` or `(B, N, A)`, in 0..1 of the unpadded image: centre x and y (A = 2), or cxcywh (A = 4).
    """

    content: torch.Tensor | None = None
    position: torch.Tensor | None = None
    anchors: torch.Tensor | None = None

    def __len__(self) -> int:
        """N, the number of queries."""
        return next(part.shape[-2] for part in (self.content, self.position, self.anchors) if part is not None)

    def detach(self) -> "Queries":
        """The same values without gradient, float32 or wider: who takes them may be of another precision."""
        parts = self.content, self.position, self.anchors
        return Queries(*(None if part is None else wide(part.detach()) for part in parts))


class GroupRequest(NamedTuple):
    """What a forward pass shall run and return beside the predictions of the model's own queries.

    Attributes:
        queries: further groups by name; None for a group whose queries the model holds itself.
        self_attention, cross_attention: whether to return these maps.
        targets: the ground truth, for families that make queries of it while they train (denoising).
        memory: whether to return the encoder's memory.
        hidden_states: whether to return what the last decoder layer makes of the queries.
        teacher_memory: what the model's memory adapters shall compare its own with; it must be asked for, too.
        masks: by a further group's name, bool broadcastable to `(B, 1, N, N)`, which of its queries each one sees in
            self-attention; all of the group where it is not named.
    """

    queries: Mapping[str, Queries | None] = {}
    self_attention: bool = False
    cross_attention: bool = False
    targets: Targets | None = None
    memory: bool = False
    hidden_states: bool = False
    teacher_memory: tuple[MemoryLevel, ...] | None = None
    masks: Mapping[str, torch.Tensor] = {}


@dataclass
class GroupOutput(ModelOutput):
    """Predictions and attention of one query group, for L decoder layers.

    Attributes:
        logits: `(L, B, N, ·)` class logits, float32 or wider; the model's `scores` read them.
        boxes: `(L, B, N, 4)` boxes, cxcywh in 0..1 of the unpadded image, float32 or wider.
        self_attention: L maps over the N queries of the group itself; None unless they were asked for.
        cross_attention: per layer the attention to the memory, dense or sampled; None unless it was asked for.
        box_distribution: `(L, B, N, 4, bins)` logits over the distances of each edge (left, top, right, bottom), where
            boxes come from such.
        box_reference: `(B, N, 4)`, the boxes from whose edges those distances are counted, cxcywh in 0..1.
        box_bins: `(bins,)`, the distance that each bin stands for, outwards, as a share of the reference box's width
            (left, right) or height; ascending.
        hidden_states: `(B, N, d)`, the queries after the last decoder layer, as its heads read them; None unless they
            were asked for.
    """

    logits: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    self_attention: tuple[AttentionMap, ...] | None = None
    cross_attention: tuple[AttentionMap, ...] | tuple[SampledAttention, ...] | None = None
    box_distribution: torch.Tensor | None = None
    box_reference: torch.Tensor | None = None
    box_bins: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


@dataclass
class Supervised(ModelOutput):
    """Predictions that only ground truth supervises: an encoder's proposals, denoising queries.

    Attributes:
        assignment: int64 `(L, B, N)`, the object of each query or `NO_OBJECT`; None: the criterion assigns.
        group: logits and boxes.
        repeats: how often every object is asked for (None: once); the loss is divided by so many times the objects.
        targets: what supervises them; None: the ground truth as it is.
        of_group: whether they are predictions of a query group, own or further, and are reduced with the groups'.
    """

    # ModelOutput would take a mapping that comes alone in its first field for its own items: `group` is none
    assignment: torch.Tensor | None = None
    group: GroupOutput | None = None
    repeats: int | None = None
    targets: Targets | None = None
    of_group: bool | None = None


@dataclass
class DetectorOutput(ModelOutput):
    """What one forward pass gives for all query groups.

    Attributes:
        memory_mask: bool `(B, H, W)` on the memory's grid, true where a token belongs to the image, false on padding;
            of a memory of several levels that of one grid on which sampled attention can be compared.
        groups: outputs by the group's name; `OWN` is the model's own object queries.
        queries: those of the model's own group, as they could be given to another decoder.
        supervised: predictions by name that only ground truth supervises; None where there are none.
        repeats: of how many groups that ask for every object the model's own is one (Group DETR; None: the only one);
            its detection loss is divided by so many times the objects.
        memory: what the decoder reads, level by level, in its order; None unless it was asked for.
        compared_memory: by the memory adapter's name, its memory beside the teacher's; None without one.
        carried_queries: `(B, N, d_t)`, its own group's hidden states in the teacher's width; None unless an adapter
            carries them.
    """

    # first, as in `Supervised`: a mapping there would be taken apart
    memory_mask: torch.Tensor | None = None
    groups: dict[str, GroupOutput] | None = None
    queries: Queries | None = None
    supervised: dict[str, Supervised] | None = None
    repeats: int | None = None
    memory: tuple[MemoryLevel, ...] | None = None
    compared_memory: dict[str, tuple[ComparedLevel, ...] | DecodedInstances] | None = None
    carried_queries: torch.Tensor | None = None
