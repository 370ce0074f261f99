"""Checks of a teacher against a student and a data set before the first step: handled, or refused with the way out."""

import copy

import torch
from torch.utils.data import Dataset
from transformers import ConditionalDetrConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data import DetectionDataset
from d3etr_hf.errors import IncompatibleDataError, IncompatibleTeacherError, UnsupportedOptionError
from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.loading import class_names_of, keep_classes
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


def class_index_by_name(teacher: ConditionalDetrConfig, names: list[str], role: str = "teacher") -> torch.Tensor:
    """The teacher's class for each of the student's class names (case and surrounding space aside).

    Args:
        role: what the errors call the model.

    Returns:
        int64 `(C,)`.

    Raises:
        IncompatibleTeacherError: the teacher lacks a class of the student, or has it twice; the names are listed.
    """

    def key(name) -> str:
        return str(name).strip().casefold()

    places: dict[str, list[int]] = {}
    for index, name in teacher.id2label.items():
        places.setdefault(key(name), []).append(int(index))
    missing = [name for name in names if key(name) not in places]
    if missing:
        raise IncompatibleTeacherError(
            f"the {role} has no class named {missing[:5]}{' ...' if len(missing) > 5 else ''} ({len(missing)} of "
            f"{len(names)}); its classes are {list(teacher.id2label.values())[:8]} ...: set id2label in its "
            "config.json to the names of the data set, or train a teacher on this data with scripts/train.py"
        )
    twice = [name for name in names if len(places[key(name)]) > 1]
    if twice:
        raise IncompatibleTeacherError(
            f"the {role} has more than one class named {twice[:5]}: make the names in its config.json unique"
        )
    return torch.tensor([places[key(name)][0] for name in names])


def with_classes_of(
    model: D3etrConditionalDetrForObjectDetection, names: list[str], role: str
) -> D3etrConditionalDetrForObjectDetection:
    """The detector, or where it has other classes, or another order, a copy with its head reduced to these, by name.

    Raises:
        IncompatibleTeacherError: it lacks one of the classes, or has one twice.
    """
    if class_names_of(model.config) == names:
        return model
    index = class_index_by_name(model.config, names, role)
    model = copy.deepcopy(model)
    keep_classes(model, index, names)
    return model


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


def check_models(student: PreTrainedModel, teacher: PreTrainedModel | None, args: D3etrTrainingArguments) -> None:
    """Refuse what cannot be distilled.

    Raises:
        IncompatibleTeacherError: no teacher where the options need one, a model of another type, layer dropout.
    """
    if not isinstance(args, D3etrTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: D3etrTrainer takes D3etrTrainingArguments")
    if teacher is not None and teacher is student:
        raise IncompatibleTeacherError("student and teacher are one and the same object: load the teacher on its own")
    if args.n_gpu > 1 or args.fsdp or args.deepspeed:
        raise UnsupportedOptionError(
            "several GPUs in one process, FSDP and DeepSpeed are not supported: start one process a GPU with "
            "`accelerate launch --multi_gpu`"
        )
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and not isinstance(model, D3etrConditionalDetrForObjectDetection):
            raise IncompatibleTeacherError(
                f"the {role} is a {type(model).__name__}: load it with "
                "D3etrConditionalDetrForObjectDetection.from_pretrained(...), which takes any Conditional DETR "
                "checkpoint"
            )
    if args.needs_teacher and teacher is None:
        raise IncompatibleTeacherError(
            "these options read a teacher but none was given: pass teacher=..., or set auxiliary_queries to "
            "'learned' or 'none' and adaptive_matching to false"
        )
    if student.config.decoder_layerdrop > 0:
        raise IncompatibleTeacherError(
            f"the student's decoder_layerdrop is {student.config.decoder_layerdrop}: skipped layers have nothing to "
            "match; set it to 0"
        )


def check_data_classes(student: ConditionalDetrConfig, datasets: dict[str, Dataset | None]) -> None:
    """The student's outputs must be the data's classes, in their order.

    Args:
        datasets: `DetectionDataset`s by what the error calls them; None is passed over.

    Raises:
        IncompatibleDataError: they are not, or a data set does not know its classes.
    """
    names = class_names_of(student)
    for role, dataset in datasets.items():
        if dataset is None:
            continue
        if not isinstance(dataset, DetectionDataset):
            raise IncompatibleDataError(
                f"{role} is a {type(dataset).__name__}: pass a DetectionDataset (its select() makes a part of it)"
            )
        if dataset.class_names != names:
            raise IncompatibleDataError(
                f"{role} has the classes {dataset.class_names[:5]} ..., the student's configuration {names[:5]} ...: "
                "build the student with the data set's id2label and label2id"
            )


def check_image_processors(student: BaseImageProcessor | None, teacher: BaseImageProcessor | None) -> None:
    """Both models see the same pixels, so they must agree on how pixels are scaled.

    Raises:
        IncompatibleTeacherError: they do not; the message names the setting and both values.
    """
    if student is None or teacher is None:
        return
    for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise IncompatibleTeacherError(
                f"the image processors differ in {name}: the student's is {ours}, the teacher's {theirs}; give the "
                "student the teacher's image processor"
            )
