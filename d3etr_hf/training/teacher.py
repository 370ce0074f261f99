"""The teacher: loaded, checked, aligned with a student, and asked."""

import copy
import difflib
import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data import DetectionDataset, DetectionTransform
from d3etr_hf.data.image_sizes import differing_setting
from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.losses import DetectionCriterion
from d3etr_hf.losses.grids import resample_map
from d3etr_hf.matching import TaughtGroup
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.outputs import OWN, GroupOutput, GroupRequest, MemoryLevel, Queries, SampledAttention


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of a batch, in the student's classes.

    Attributes:
        group: its predictions and maps in the layers that the student's follow.
        last: its predictions in its own last layer, with L = 1.
        queries: its queries of this batch; None of a teacher of predictions only.
        memory_mask: bool `(B, H, W)`, of its memory; None likewise.
        memory: its encoder's memory, level by level; None unless it was asked for.
        hidden_states: `(B, N_t, d_t)`, its queries after the last decoder layer; None likewise.
        own_grid: whether its memory's grid is another than that of the batch as it is padded.
    """

    group: TaughtGroup
    last: TaughtGroup
    queries: Queries | None
    memory_mask: torch.Tensor | None
    memory: tuple[MemoryLevel, ...] | None = None
    hidden_states: torch.Tensor | None = None
    own_grid: bool = False

    def on_memory(self, memory_mask: torch.Tensor) -> "TeacherOutput":
        """The same with dense cross-attention brought to the student's memory, where it comes of other pixels.

        Of those the losses cannot tell: two grids of one size may then hold other parts of the image in their cells.

        Args:
            memory_mask: bool `(B, H', W')`, of the student's memory.
        """
        maps = self.group.cross_attention
        if maps is None or isinstance(maps[0], SampledAttention):
            return replace(self, memory_mask=memory_mask)
        resampled = tuple(resample_map(layer.probability, self.memory_mask, memory_mask) for layer in maps)
        return replace(self, group=replace(self.group, cross_attention=resampled), memory_mask=memory_mask)


class Teacher:
    """A frozen detector in eval mode, on the device, in autocast, with its class index and layer map.

    Args:
        detector: the teacher's model; it is moved and frozen.
        class_names: the student's classes, in order.
        student_depth: the number of the student's decoder layers.
        layer_map: the teacher's decoder layer for each of the student's; None spreads them evenly, last to last.

    Attributes:
        detector: the model.
        name: the folder or Hub id that it was loaded from.
        class_index: int64 `(C,)`, the teacher's class for each of the student's.
        layer_map: the teacher's decoder layer for each of the student's.
        criterion: by which it assigns ground truth to its own queries.

    Raises:
        IncompatibleTeacherError: it lacks a class or a layer.
    """

    def __init__(
        self,
        detector: Detector | OtherDetector,
        class_names: list[str],
        student_depth: int,
        layer_map: list[int] | None = None,
    ):
        self.class_index = class_index_by_name(detector, class_names)
        # read on the host, once: most teachers' classes need no gathering
        self._classes_in_order = self.class_index.tolist() == list(range(len(class_names)))
        self.layer_map = spread_layers(detector.decoder_depth, student_depth, layer_map)
        self.detector = detector.eval().requires_grad_(False)
        self.name = detector.name_or_path or "teacher"
        self.criterion: DetectionCriterion = detector.criterion()

    def to(self, device: torch.device) -> "Teacher":
        """Move the teacher."""
        self.detector.to(device)
        self.class_index = self.class_index.to(device)
        return self

    def queries(self) -> Queries | None:
        """Its queries without a forward pass; None where they depend on the image."""
        queries = self.detector.static_queries()
        return None if queries is None else queries.detach()

    @torch.no_grad()
    def __call__(
        self,
        pixels: Mapping[str, torch.Tensor],
        request: GroupRequest,
        autocast: Callable[[], AbstractContextManager],
    ) -> TeacherOutput:
        """Run the teacher.

        Args:
            pixels: `pixel_values` `(B, 3, H, W)` and `pixel_mask` `(B, H, W)`.
            request: which maps to return, and whether memory and hidden states.
            autocast: makes the context of mixed precision; outside the model's own pass there is none but this.
        """
        pixel_values = pixels["pixel_values"].to(self.detector.dtype)
        with autocast():
            output = self.detector(pixel_values, pixels["pixel_mask"], request=request)
        group = output.groups[OWN]
        last = replace(self._aligned(group, [-1]), self_attention=None, cross_attention=None)
        memory = None if output.memory is None else tuple(level.detach() for level in output.memory)
        states = None if group.hidden_states is None else group.hidden_states.detach()
        given = output.queries, output.memory_mask, memory, states
        return TeacherOutput(self._aligned(group, self.layer_map), last, *given)

    def _aligned(self, group: GroupOutput, layers: list[int]) -> TaughtGroup:
        """The outputs in these of its layers, for the student's classes; no gradient reaches the teacher."""

        def chosen(values) -> tuple | None:
            return None if values is None else tuple(values[layer].detach() for layer in layers)

        probabilities = self.criterion.scores.probabilities(torch.stack(chosen(group.logits)))
        classes = len(self.class_index)
        in_order = self._classes_in_order
        return TaughtGroup(
            probabilities=probabilities[..., :classes] if in_order else probabilities[..., self.class_index],
            boxes=torch.stack(chosen(group.boxes)),
            self_attention=chosen(group.self_attention),
            cross_attention=chosen(group.cross_attention),
            box_distribution=None if group.box_distribution is None else torch.stack(chosen(group.box_distribution)),
            box_reference=group.box_reference,
            box_bins=group.box_bins,
        )


def class_index_by_name(detector: Detector | OtherDetector, names: list[str], role: str = "teacher") -> torch.Tensor:
    """The detector's class for each of these class names (case and surrounding space aside).

    Args:
        role: what the errors call the model.

    Returns:
        int64 `(C,)`.

    Raises:
        IncompatibleTeacherError: the teacher lacks a class of the student, or has it twice; the names are listed.
    """

    def key(name) -> str:
        return str(name).strip().casefold()

    id2label = detector.config.id2label
    places: dict[str, list[int]] = {}
    for index, name in id2label.items():
        places.setdefault(key(name), []).append(int(index))
    missing = [name for name in names if key(name) not in places]
    if missing:
        nearest = nearest_names(missing, [str(name) for name in id2label.values()])
        same = f"if these mean the same: --rename_classes {shlex.quote(json.dumps(nearest, ensure_ascii=False))}; "
        raise IncompatibleTeacherError(
            f"the {role} has no class named {missing[:5]}{' ...' if len(missing) > 5 else ''} ({len(missing)} of "
            f"{len(names)}); its classes are {list(id2label.values())[:8]} ...: {same if nearest else ''}"
            "set id2label in its config.json to the names of the data set, or fine-tune it on this data first: "
            f"d3etr train --model {detector.name_or_path or role.upper()} --new_head true"
        )
    twice = [name for name in names if len(places[key(name)]) > 1]
    if twice:
        raise IncompatibleTeacherError(
            f"the {role} has more than one class named {twice[:5]}: make the names in its config.json unique"
        )
    return torch.tensor([places[key(name)][0] for name in names])


def nearest_names(missing: list[str], there: list[str], most: int = 5) -> dict[str, str]:
    """By missing name the most similar of those that are there, case aside; where none is similar, nothing."""
    by_key = {name.strip().casefold(): name for name in there}
    found = {name: difflib.get_close_matches(name.strip().casefold(), by_key, n=1) for name in missing}
    pairs = [(name, by_key[nearest[0]]) for name, nearest in found.items() if nearest]
    return dict(pairs[:most])


def with_classes_of(detector: Detector, names: list[str], role: str) -> Detector:
    """The detector, or where it has other classes, or another order, a copy that detects these alone, by name.

    Each scores as it did: what the detector gives to its other classes no class of the data gets.

    Raises:
        IncompatibleTeacherError: it lacks one of the classes, or has one twice.
    """
    if detector.class_names == names:
        return detector
    index = class_index_by_name(detector, names, role)
    detector = copy.deepcopy(detector)
    detector.read_classes(index, names)
    return detector


def spread_layers(teacher_layers: int, student_layers: int, layer_map: list[int] | None = None) -> list[int]:
    """The teacher's decoder layer (from 0) that each student layer follows; by default evenly spread, last to last.

    Raises:
        IncompatibleTeacherError: a given `layer_map` has another length, or names a layer the teacher lacks.
    """
    if layer_map is None:
        return [-(-(layer + 1) * teacher_layers // student_layers) - 1 for layer in range(student_layers)]
    if len(layer_map) != student_layers or not all(0 <= layer < teacher_layers for layer in layer_map):
        raise IncompatibleTeacherError(
            f"layer_map={layer_map}: it needs one of the teacher's layers 0..{teacher_layers - 1} for each of the "
            f"student's {student_layers} layers"
        )
    return list(layer_map)


def teacher_pixels(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the teacher sees of a batch of `DetectionCollator`: pixels of its own, or the student's where it has none.

    Returns:
        `pixel_values` `(B, 3, H, W)` float32 and `pixel_mask` `(B, H, W)` int64.
    """
    prefix = "teacher_" if "teacher_pixel_values" in batch else ""
    return {name: batch[f"{prefix}{name}"] for name in ("pixel_values", "pixel_mask")}


def check_image_processors(
    student: BaseImageProcessor | None, teacher: BaseImageProcessor | None, dataset: DetectionDataset | None
) -> None:
    """Without pixels of its own the teacher sees the student's, so the two must agree on how pixels are made.

    Args:
        student, teacher: their image processors; None where that is not known.
        dataset: what is trained on; None for nothing.

    Raises:
        IncompatibleTeacherError: they do not agree, and the data set's transform makes no pixels for the teacher; the
            message names the setting and both values.
    """
    if student is None or teacher is None or dataset is None:
        return
    transform = dataset.transform
    if isinstance(transform, DetectionTransform) and transform.teacher_processor is not None:
        return
    difference = differing_setting(student, teacher)
    if difference is not None:
        raise IncompatibleTeacherError(
            f"the image processors differ in {difference}; the train_dataset makes pixels for the student only: give "
            "load_splits (or DetectionTransform) the teacher's as teacher_processor, or the student the teacher's "
            "image processor"
        )
