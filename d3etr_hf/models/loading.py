"""Finding, checking and building detectors for the scripts; every failure says what to do."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoBackbone, AutoConfig, ConditionalDetrConfig, ConditionalDetrImageProcessorPil
from transformers.utils import logging

from ..arguments import option
from .conditional_detr import D3etrConditionalDetrForObjectDetection
from .initialisation import is_resnet

logger = logging.get_logger(__name__)

INHERITABLE_PARTS = ("encoder", "decoder", "heads", "queries")


class DetectorLoadError(ValueError):
    """A detector cannot be loaded or built as asked."""


@dataclass
class ModelArguments:
    """Which detector is trained: a checkpoint to go on from, or the configuration of a new one."""

    model: str | None = option(None, "Checkpoint to start from: a folder or a Hub id. Or give `model_config`.")
    model_config: dict | str | None = option(
        None, "Configuration of a new model: fields of ConditionalDetrConfig, or a YAML or JSON file that holds them."
    )
    backbone_weights: str | None = option(
        None, "Pretrained weights for a new model's backbone: a folder or Hub id that AutoBackbone loads."
    )

    def __post_init__(self):
        if (self.model is None) == (self.model_config is None):
            raise ValueError("give either 'model' (a checkpoint) or 'model_config' (a new model), and not both")
        if self.backbone_weights is not None and self.model is not None:
            raise ValueError("'backbone_weights' is for a new model: with 'model' the backbone comes with it")


@dataclass
class TeacherArguments:
    """Who teaches, and what the student takes over before it learns."""

    teacher: str | None = option(None, "The teacher: a folder or Hub id of a Conditional DETR checkpoint.")
    inherit_from_teacher: list[str] = option(
        [],
        "Parts that start from the teacher's weights where shapes allow: any of encoder, decoder, heads, queries.",
    )

    def __post_init__(self):
        unknown = [part for part in self.inherit_from_teacher if part not in INHERITABLE_PARTS]
        if unknown:
            raise ValueError(f"inherit_from_teacher: {unknown} are none of {list(INHERITABLE_PARTS)}")
        if self.inherit_from_teacher and self.teacher is None:
            raise ValueError("inherit_from_teacher needs a 'teacher'")


def load_detector(path: str, role: str = "model") -> D3etrConditionalDetrForObjectDetection:
    """Load a Conditional DETR checkpoint, complete, in float32.

    Args:
        path: a folder or Hub id.
        role: what it is for, as the errors call it.

    Raises:
        DetectorLoadError: nothing there, no detector, another family, tensors missing, or timm is needed and absent.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DetectorLoadError(
            f"{role} {path!r}: no model configuration could be read from there ({error}); give a folder with a "
            "config.json, or the id of a model on the Hub"
        ) from error
    if config.model_type != "conditional_detr":
        raise DetectorLoadError(
            f"{role} {path!r} is a {config.model_type!r} model; only Conditional DETR ('conditional_detr') is "
            "supported so far"
        )
    if not any("ForObjectDetection" in name for name in config.architectures or ()):
        raise DetectorLoadError(
            f"{role} {path!r} is no detector: its architectures are {config.architectures}, and "
            "ConditionalDetrForObjectDetection is needed"
        )
    _refuse_missing_timm(config, f"{role} {path!r}")
    try:
        model, info = D3etrConditionalDetrForObjectDetection.from_pretrained(path, output_loading_info=True)
    except OSError as error:
        raise DetectorLoadError(f"{role} {path!r}: the weights could not be read ({error})") from error
    if info["missing_keys"]:
        raise DetectorLoadError(
            f"{role} {path!r}: {len(info['missing_keys'])} tensors are missing from the checkpoint, the first "
            f"{sorted(info['missing_keys'])[:3]}"
        )
    return model


def build_model(arguments: ModelArguments, class_names: list[str]) -> D3etrConditionalDetrForObjectDetection:
    """The model to train: loaded, or new from its configuration with the data set's class names.

    Raises:
        DetectorLoadError: it cannot be loaded or built, or a loaded model's classes are not the data set's.
    """
    id2label = dict(enumerate(class_names))
    if arguments.model is not None:
        model = load_detector(arguments.model, "model")
        if list(model.config.id2label.values()) != class_names:
            raise DetectorLoadError(
                f"model {arguments.model!r} has the classes {list(model.config.id2label.values())[:5]} ..., the data "
                f"set {class_names[:5]} ...: they must be the same, in the same order"
            )
        return model
    options = arguments.model_config
    if isinstance(options, str):
        options = yaml.safe_load(Path(options).read_text(encoding="utf-8"))
    try:
        config = ConditionalDetrConfig(
            **options, id2label=id2label, label2id={name: index for index, name in id2label.items()}
        )
    except (TypeError, ValueError) as error:
        raise DetectorLoadError(f"model_config: {error}") from error
    unknown = set(options) - set(ConditionalDetrConfig().to_dict())
    if unknown:
        raise DetectorLoadError(f"model_config: ConditionalDetrConfig has no {sorted(unknown)}")
    _refuse_missing_timm(config, "model_config")
    model = D3etrConditionalDetrForObjectDetection(config)
    if arguments.backbone_weights is not None:
        load_backbone_weights(model, arguments.backbone_weights)
    elif is_resnet(config):
        logger.warning(
            "a new ResNet backbone without backbone_weights: its batch norm is frozen at the identity, as in the "
            "paper, so it will hardly train; set backbone_weights, for example microsoft/resnet-50"
        )
    return model


@torch.no_grad()
def load_backbone_weights(model: D3etrConditionalDetrForObjectDetection, path: str) -> None:
    """Fill the backbone with pretrained weights, batch norm statistics included.

    Raises:
        DetectorLoadError: they cannot be read, or are of another architecture.
    """
    try:
        backbone = AutoBackbone.from_pretrained(path, out_features=model.config.backbone_config.out_features)
        own, loaded = model.model.backbone.model.state_dict(), backbone.state_dict()
        model.model.backbone.model.load_state_dict({name: loaded[name] for name in own}, strict=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DetectorLoadError(
            f"backbone_weights {path!r} do not fit a {model.config.backbone_config.model_type!r} backbone: {error}"
        ) from error


def load_image_processor(
    path: str | None, short_side: int | None = None, long_side: int | None = None
) -> ConditionalDetrImageProcessorPil | None:
    """The image processor saved beside a checkpoint (None if there is none), or a new one where `path` is None.

    Args:
        short_side, long_side: the size in pixels to resize to, instead of the saved one.
    """
    size = {} if short_side is None else {"size": {"shortest_edge": short_side, "longest_edge": long_side}}
    if path is None:
        return ConditionalDetrImageProcessorPil(**size)
    try:
        return ConditionalDetrImageProcessorPil.from_pretrained(path, **size)
    except OSError:
        logger.warning(f"{path} holds no image processor, so its pixel scaling cannot be checked")
        return None


def _refuse_missing_timm(config: ConditionalDetrConfig, what: str) -> None:
    if config.backbone_config.model_type == "timm_backbone" and importlib.util.find_spec("timm") is None:
        raise DetectorLoadError(
            f"{what} has a timm backbone ({config.backbone_config.backbone!r}) and timm is not installed: "
            "pip install 'd3etr_hf[timm]'"
        )
