"""Finding, checking and building detectors; every failure says what to do."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import logging

from d3etr_hf.configurations import option
from d3etr_hf.errors import DetectorLoadError, quoted
from d3etr_hf.files import nearest_place
from d3etr_hf.models.backbones import load_backbone_weights
from d3etr_hf.models.detector import ROLES, Detector, class_names_of, inherit
from d3etr_hf.models.families import DEFAULT_FAMILY, FAMILIES, family_of_type
from d3etr_hf.models.initialisation import is_resnet
from d3etr_hf.models.new_classes import with_new_classes
from d3etr_hf.models.new_models import check_model_options, new_model, read_model_config
from d3etr_hf.models.other_detector import OtherDetector, load_other_detector
from d3etr_hf.models.places import refuse_other_place
from d3etr_hf.models.timm_names import (
    DILATED,
    DILATED_STRIDE,
    TIMM_NAMES,
    dilate_last_stage,
    native_resnet,
    read_config,
    refuse_missing_timm,
    timm_backbone,
    why_not_native,
)
from d3etr_hf.models.trial import build_errors, build_on_meta, library_errors, try_detector
from d3etr_hf.models.weight_files import AGAIN, check_loaded, check_weight_files, quiet_loading

logger = logging.get_logger(__name__)

INHERITABLE_PARTS = tuple(role for role in ROLES if role != "backbone")


@dataclass
class ModelArguments:
    """Which detector is trained: a checkpoint to go on from, or the configuration of a new one."""

    model: str | None = option(None, "Checkpoint to start from: a folder or a Hub id. Or give `model_config`.")
    model_config: dict | str | None = option(
        None,
        "Configuration of a new model: `model_type` (by default conditional_detr) and fields of its configuration "
        "class in Transformers, or a YAML or JSON file that holds them.",
    )
    backbone_weights: str | None = option(
        None, "Pretrained weights for a new model's backbone: a folder or Hub id of the same architecture."
    )
    new_head: bool = option(
        False,
        "Give `model` a class head for the data's classes: those known by name go on, the others start afresh.",
    )

    def __post_init__(self):
        if (self.model is None) == (self.model_config is None):
            raise ValueError("give either 'model' (a checkpoint) or 'model_config' (a new model), and not both")
        if self.backbone_weights is not None and self.model is not None:
            raise ValueError("'backbone_weights' is for a new model: with 'model' the backbone comes with it")
        if self.new_head and self.model is None:
            raise ValueError("'new_head' is for a 'model' to go on from: a new model has the data's classes anyway")


@dataclass
class TeacherArguments:
    """Who teaches, and what the student takes over before it learns."""

    teacher: str | None = option(None, "The teacher: a folder or Hub id of a detector's checkpoint.")
    inherit_from_teacher: list[str] = option(
        [],
        "Parts that start from the teacher's weights where shapes allow: any of encoder, decoder, heads, queries; of "
        "a teacher of the student's own family.",
    )

    def __post_init__(self):
        unknown = [part for part in self.inherit_from_teacher if part not in INHERITABLE_PARTS]
        if unknown:
            raise ValueError(f"inherit_from_teacher: {unknown} are none of {list(INHERITABLE_PARTS)}")
        if self.inherit_from_teacher and self.teacher is None:
            raise ValueError("inherit_from_teacher needs a 'teacher'")


def load_detector(path: str, role: str = "model") -> Detector:
    """Load a checkpoint of one of the families, complete, in float32.

    A ResNet of timm's becomes Transformers' own one, which computes the same, and is saved as such.

    Args:
        path: a folder or Hub id.
        role: what it is for, as the errors call it.

    Raises:
        DetectorLoadError: nothing there, no detector, another family, values that make no model, weights that are
            not safetensors or do not fit, or timm is needed and absent.
    """
    what = f"{role} {path!r}"
    family, config, timm = _check_checkpoint(path, what)
    names = check_weight_files(path, what, build_on_meta(family, config, what))
    if timm is not None:
        names |= TIMM_NAMES
    with (
        quiet_loading(),
        library_errors(f"{what}: the weights could not be read, or do not fit its config.json", AGAIN),
    ):
        model, info = family.from_pretrained(
            path,
            config=config,
            key_mapping=names or None,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # which are told by name below
        )
    check_loaded(model, info, what)
    if timm is not None and timm.output_stride == DILATED_STRIDE:
        dilate_last_stage(model.backbone_module)
        model.unsaveable = DILATED
    try_detector(model, what)
    return model


def load_teacher(path: str, role: str = "teacher") -> Detector | OtherDetector:
    """Load what only predicts: a checkpoint of one of the families, or any detector of Transformers.

    Args:
        path: a folder or Hub id.
        role: what it is for, as the errors call it.

    Raises:
        DetectorLoadError: as `load_detector`, or it gives no predictions that can be read.
    """
    model_type = check_teacher(path, role)
    return load_detector(path, role) if model_type in FAMILIES else load_other_detector(path, model_type, role)


def check_teacher(path: str, role: str = "teacher") -> str:
    """The `model_type` of a checkpoint for `load_teacher`, by its configuration alone: before anything is loaded.

    Raises:
        DetectorLoadError: nothing there that could be a detector.
    """
    model_type = _read_config(path, f"{role} {path!r}").model_type
    if model_type in FAMILIES:
        family_of_checkpoint(path, role)
    elif model_type not in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        raise DetectorLoadError(
            f"{role} {path!r} is a {model_type!r} model, which is no detector in Transformers: it must be one of "
            f"{', '.join(FAMILIES)}, or for its predictions alone any that AutoModelForObjectDetection loads"
        )
    return model_type


def family_of_checkpoint(path: str, role: str = "model") -> type[Detector]:
    """The family of a checkpoint, by its configuration alone: whether it can be loaded, before anything is.

    Args, Raises: as `load_detector`.
    """
    return _check_checkpoint(path, f"{role} {path!r}")[0]


def _check_checkpoint(path: str, what: str) -> tuple[type[Detector], PreTrainedConfig, Any]:
    """Its family and configuration, and the timm backbone that Transformers' own takes the place of."""
    config = _read_config(path, what)
    family = family_of_type(config.model_type, what)
    if not any("ForObjectDetection" in name for name in config.architectures or ()):
        raise DetectorLoadError(
            f"{what} is no detector: its architectures are {quoted(config.architectures)}, and "
            f"{family.stock_class.__name__} is needed"
        )
    refuse_missing_timm(config, what)
    timm = timm_backbone(config)
    if timm is not None and why_not_native(timm) is None:
        config.backbone_config = native_resnet(timm)
    else:
        timm = None
    with build_errors(what, (ValueError,)):
        family.check_config(config)
    return family, config, timm


def _read_config(path: str, what: str) -> PreTrainedConfig:
    refuse_other_place(path, what)
    nearest = "" if Path(path).exists() else nearest_place(path)
    with library_errors(
        f"{what}: no model configuration could be read from there",
        f"give a folder with a config.json, or the id of a model on the Hub{nearest}",
    ):
        return read_config(path, what)


def read_model_options(arguments: ModelArguments) -> dict | None:
    """The configuration of a new model, read from its file where `model_config` names one."""
    options = arguments.model_config
    return read_model_config(options) if isinstance(options, str) else options


def build_model(arguments: ModelArguments, class_names: list[str]) -> Detector:
    """The model to train: loaded, or new from its configuration with the data set's class names.

    Raises:
        DetectorLoadError: it cannot be loaded or built, no checkpoint could hold it, or a loaded model's classes are
            not the data set's and no new head is asked for.
    """
    if arguments.model is not None:
        model = load_detector(arguments.model, "model")
        if model.unsaveable is not None:
            raise DetectorLoadError(f"model {arguments.model!r} cannot be trained: {model.unsaveable}")
        if arguments.new_head:
            return with_new_classes(model, class_names)
        _refuse_other_classes(model.config, class_names, f"model {arguments.model!r}")
        return model
    place = f"model_config {arguments.model_config!r}" if isinstance(arguments.model_config, str) else "model_config"
    model = new_model(read_model_options(arguments), class_names, place)
    if arguments.backbone_weights is not None:
        load_backbone_weights(model, arguments.backbone_weights)
    elif is_resnet(model.config.backbone_config):
        logger.warning(
            "a new ResNet backbone without backbone_weights: its batch norm is frozen at the identity, as in the "
            "paper, so it will hardly train; set backbone_weights, for example microsoft/resnet-50"
        )
    return model


def model_type_of(arguments: ModelArguments) -> str:
    """The family of the model to train, as Transformers calls it, before it is loaded or built.

    Raises:
        DetectorLoadError: no model configuration could be read, or it is of no family, or holds what no model has, or
            there are no such `backbone_weights`.
    """
    if arguments.backbone_weights is not None:
        refuse_other_place(arguments.backbone_weights, f"backbone_weights {arguments.backbone_weights!r}")
    if arguments.model is not None:
        return _check_checkpoint(arguments.model, f"model {arguments.model!r}")[1].model_type
    options = read_model_options(arguments)
    place = f"model_config {arguments.model_config!r}" if isinstance(arguments.model_config, str) else "model_config"
    check_model_options(options, place)
    return options.get("model_type", DEFAULT_FAMILY)


def inherit_from_teacher(
    student: Detector,
    teacher: Detector | OtherDetector,
    parts: list[str],
    class_index: torch.Tensor,
    layer_map: list[int],
) -> tuple[list[str], list[str]]:
    """Start parts of the student from the teacher's weights where shapes allow, in place; see `inherit`.

    Raises:
        DetectorLoadError: the two are of different families, or nothing at all could be copied.
    """
    if not isinstance(teacher, type(student)):
        raise DetectorLoadError(
            f"inherit_from_teacher={list(parts)}: the student is a {student.title}, the teacher a {teacher.title}; "
            "leave the option empty"
        )
    copied, skipped = inherit(student, teacher, parts, class_index, layer_map)
    if not copied:
        raise DetectorLoadError(
            f"inherit_from_teacher={list(parts)}: no tensor of the teacher fits the student (its hidden size is "
            f"{teacher.width}, the student's {student.width}); leave the option empty"
        )
    logger.info(f"inherited {len(copied)} tensors from the teacher, kept {len(skipped)} of the student's own")
    return copied, skipped


def _refuse_other_classes(config: PreTrainedConfig, class_names: list[str], what: str) -> None:
    """The outputs of a model that is loaded to go on must be the data set's classes, in their order."""
    names = class_names_of(config)
    if names == class_names:
        return
    for index, (name, wanted) in enumerate(zip_longest(names, class_names)):
        if name != wanted:
            raise DetectorLoadError(
                f"{what} has {len(names)} classes, the data set {len(class_names)}; they differ first at class "
                f"{index}, {name!r} in the model and {wanted!r} in the data: they must be the same, in the same "
                "order, unless the model gets a head for the data's classes: --new_head true"
            )
