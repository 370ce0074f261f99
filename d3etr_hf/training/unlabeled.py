"""Images without labels in training: the teacher supervises them, and nothing that reads ground truth does."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from d3etr_hf.data.reading import require_place
from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.models.memory_methods import MEMORY_METHODS
from d3etr_hf.outputs import DetectorOutput, GroupOutput, Supervised, Targets
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.distillation_schedule import DistillationSchedule
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

# options of distillation terms that read ground truth
OF_GROUND_TRUTH = (
    "logits_distillation_weight",
    "shared_object_queries",
    *(f"{name}_weight" for name, method in MEMORY_METHODS.items() if method.reads_ground_truth),
)
# options of 1, other values of which leave steps without distillation
OF_PLAIN_STEPS = ("distillation_interval", "distillation_end")
REMEDY = "or leave unlabeled_images out"


def check_unlabeled_option(folder: str | None, arguments: D3etrTrainingArguments, teacher: str | None) -> None:
    """`check_unlabeled` of what a run is asked to do, before anything is loaded.

    Args:
        folder: of images without labels; None for none.
        arguments: what it distils, and when.
        teacher: its place; None without one.

    Raises:
        DatasetError: there is no such folder.
    """
    if folder is not None:
        require_place(folder, "unlabeled_images")
        check_unlabeled(arguments.distillation, arguments.schedule, has_teacher=teacher is not None)


def check_unlabeled(options: Distillation, schedule: DistillationSchedule, has_teacher: bool = True) -> None:
    """Refuse images without labels where nothing would be learned from them, or what cannot be.

    Raises:
        UnsupportedOptionError: there is no teacher, a term reads ground truth, no other distillation term is on, or
            some steps do not distil.
    """
    if not has_teacher:
        raise UnsupportedOptionError(
            "unlabeled_images: only a teacher can supervise images without labels, and there is none: give one "
            f"(d3etr distill), {REMEDY}"
        )
    if reading := [name for name in OF_GROUND_TRUTH if getattr(options, name) > 0]:
        raise UnsupportedOptionError(
            f"unlabeled_images: {', '.join(reading)} would read ground truth, which such images do not have: set "
            f"{'it' if len(reading) == 1 else 'them'} to 0 or false, {REMEDY}"
        )
    if not options.follows_teacher:
        raise UnsupportedOptionError(
            "unlabeled_images: no distillation term is on, and nothing would be learned from such images: set "
            f"adaptive_matching to true and one of the terms' weights above 0, {REMEDY}"
        )
    if given := [f"{name}={vars(schedule)[name]}" for name in OF_PLAIN_STEPS if vars(schedule)[name] != 1]:
        raise UnsupportedOptionError(
            f"unlabeled_images: nothing is learned from such images in steps without distillation, and there would be "
            f"some with {' and '.join(given)}: set {'it' if len(given) == 1 else 'them'} to 1, {REMEDY}"
        )


def is_labeled(label: Mapping[str, Any]) -> bool:
    """Whether an image of a batch has ground truth, by what the collator tells of it."""
    return label.get("labeled", True)


def labeled_part(
    student: DetectorOutput, targets: Targets, *assignments: Mapping[str, torch.Tensor]
) -> tuple[DetectorOutput, Targets, tuple[dict[str, torch.Tensor], ...]]:
    """What the detection loss is of: predictions, ground truth and assignments of those images that have labels.

    Args:
        student: of the whole batch.
        targets: of the whole batch; where not one image is labelled the first stands for them, so that everything that
            learns has a gradient, and the loss must be multiplied by 0.
        assignments: int64 `(L, B, N)`, or `(B, N)`, by name.
    """
    if targets.labeled is None:
        return student, targets, tuple(map(dict, assignments))
    images = [image for image, labeled in enumerate(targets.labeled) if labeled] or [0]
    rows = torch.tensor(images, device=targets.boxes.device)
    groups = {name: _group_of(group, rows) for name, group in student.groups.items()}
    supervised = {name: _supervised_of(part, images, rows) for name, part in (student.supervised or {}).items()}
    chosen = ({name: of.index_select(-2, rows) for name, of in each.items()} for each in assignments)
    return replace(student, groups=groups, supervised=supervised), targets.of_images(images), tuple(chosen)


def _supervised_of(part: Supervised, images: list[int], rows: torch.Tensor) -> Supervised:
    return replace(
        part,
        group=_group_of(part.group, rows),
        assignment=None if part.assignment is None else part.assignment.index_select(1, rows),
        targets=None if part.targets is None else part.targets.of_images(images),
    )


def _group_of(group: GroupOutput, rows: torch.Tensor) -> GroupOutput:
    """Its predictions of these images; what is compared with a teacher's is left out."""
    distributed = group.box_distribution is not None
    return GroupOutput(
        logits=group.logits.index_select(1, rows),
        boxes=group.boxes.index_select(1, rows),
        box_distribution=group.box_distribution.index_select(1, rows) if distributed else None,
        box_reference=group.box_reference.index_select(0, rows) if distributed else None,
        box_bins=group.box_bins,
    )
