"""Terms of the objective that compare encoder memories: the field's baselines beside D3ETR's own terms."""

from typing import Any

import torch

from d3etr_hf.losses import (
    DetectionCriterion,
    clockdistill_memory_distillation,
    defeat_distillation,
    detrdistill_memory_distillation,
    fgd_distillation,
    fitnet_distillation,
    icd_distillation,
    query_quality,
    vidt_distillation,
)
from d3etr_hf.matching import assignment_of, start_solving
from d3etr_hf.models.instance_decoder import FAKES
from d3etr_hf.outputs import DetectorOutput, Targets
from d3etr_hf.training.teacher import TeacherOutput

TEACHER = "teacher"


def memory_losses(
    method: str,
    student: DetectorOutput,
    teacher: TeacherOutput,
    targets: Targets,
    images: torch.Tensor,
    objects: torch.Tensor,
    quality: torch.Tensor | None,
) -> torch.Tensor:
    """One method's loss, `(levels,)`, or `(1,)` where all levels are taken together; see the losses for what each is.

    Args:
        images, objects: as in `Shares`.
        quality: `(B, N_t)`, of the teacher's queries; None where no method asks for it.
    """
    levels: Any = student.compared_memory[method]
    match method:
        case "fitnet":
            return fitnet_distillation(levels, images)
        case "fgd":
            return fgd_distillation(levels, targets, images, objects)
        case "defeat":
            return defeat_distillation(levels, targets, images)
        case "detrdistill_memory":
            return detrdistill_memory_distillation(levels, teacher.hidden_states, quality, images)
        case "clockdistill_memory":
            return clockdistill_memory_distillation(levels, targets, images, objects)
        case "icd":
            return icd_distillation(levels, FAKES, objects)
        case "vidt":
            return vidt_distillation(levels, teacher.hidden_states, student.carried_queries, images)
    raise ValueError(f"no loss compares memories as {method!r}")


def teacher_quality(
    criterion: DetectionCriterion, teacher: TeacherOutput, targets: Targets, tolerant: bool
) -> torch.Tensor:
    """`(B, N_t)`: how well each query of the teacher's last layer finds the object that it answers for.

    Args:
        criterion: by which the teacher assigns ground truth to its queries.
        tolerant: see `start_solving`.

    Raises:
        NonFiniteCostError: a prediction of the teacher is NaN or infinite.
    """
    probabilities, boxes = teacher.last.probabilities, teacher.last.boxes
    problem = criterion.problem(probabilities, boxes, targets, TEACHER)
    solution = start_solving({TEACHER: problem}, tolerant)()[TEACHER]
    assignment = assignment_of(solution, boxes.shape[2])
    return query_quality(probabilities[0], boxes[0], assignment[0], targets)
