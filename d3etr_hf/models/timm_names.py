"""ResNets as timm calls them: most public checkpoints were saved over one, and Transformers' own computes the same.

Such a checkpoint is loaded without timm: its configuration is said in Transformers' fields, its tensors are renamed as
they are read, and what is saved afterwards is native.
"""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, ResNetConfig
from transformers.utils import CONFIG_NAME

from d3etr_hf.errors import DetectorLoadError, one_line
from d3etr_hf.files import regular_file
from d3etr_hf.models.configuration_checks import check_fields
from d3etr_hf.optional_torchvision import PUT_RIGHT

# layer type and blocks of each stage (He et al., CVPR 2016, table 1)
RESNETS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}
STRIDE, DILATED_STRIDE = 32, 16
DILATED = (
    "the last stage of its backbone is dilated (DC5), which no configuration of Transformers' own ResNet can say; it "
    "can teach and be evaluated, and not be trained or saved"
)


def _timm_names() -> dict[str, str]:
    """`key_mapping` of `from_pretrained`: regular expressions of timm's names, and Transformers' names for them."""
    names = {r"model\._backbone\.": "model."}
    for part, name in (("conv1", "convolution"), ("bn1", "normalization")):
        names[rf"backbone\.(conv_encoder\.model|model)\.{part}"] = rf"backbone.\1.embedder.embedder.{name}"
    for stage in range(4):
        block, ours = rf"model\.layer{stage + 1}\.(\d+)\.", rf"model.encoder.stages.{stage}.layers.\1."
        for number in (1, 2, 3):
            names[rf"{block}conv{number}"] = rf"{ours}layer.{number - 1}.convolution"
            names[rf"{block}bn{number}"] = rf"{ours}layer.{number - 1}.normalization"
        names[rf"{block}downsample\.0"] = rf"{ours}shortcut.convolution"
        names[rf"{block}downsample\.1"] = rf"{ours}shortcut.normalization"
    return names


TIMM_NAMES = _timm_names()


def read_config(path: str, what: str) -> PreTrainedConfig:
    """The configuration of a checkpoint as Transformers reads it, in a folder or on the Hub.

    Old ones name timm's backbone in `backbone` and hand it `backbone_kwargs`; with those beside it Transformers would
    look for a model of the backbone's name on the Hub. Code that comes with a checkpoint is never run.

    Args:
        path: a folder or Hub id.
        what: the checkpoint, as the errors call it.

    Raises:
        DetectorLoadError: see `check_fields`.
        OSError, ValueError, StrictDataclassError: there is none, or it cannot be read.
    """
    if Path(path).is_dir():
        regular_file(Path(path) / CONFIG_NAME)
    fields, _ = PreTrainedConfig.get_config_dict(path)
    if not fields:
        raise OSError("there is no config.json")
    check_fields(fields, what)
    of_timm = fields.get("backbone_config") is None and fields.get("use_timm_backbone", True)
    if not of_timm or "backbone_kwargs" not in fields or fields.get("model_type") not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    options = fields.pop("backbone_kwargs") or {}
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    for name, value in options.items():
        setattr(config.backbone_config, "num_channels" if name == "in_chans" else name, value)
    if getattr(config, "num_feature_levels", None) == 1:
        # encoders of one scale took the last stage, whatever the options that were saved with them say
        config.backbone_config.out_indices = [-1]
    return config


def timm_backbone(config: PreTrainedConfig) -> Any:
    """The configuration of the backbone if it is timm's, else None."""
    backbone = getattr(config, "backbone_config", None)
    return backbone if backbone is not None and backbone.model_type == "timm_backbone" else None


def refuse_missing_timm(config: PreTrainedConfig, what: str, reason: str | None = None) -> None:
    """Unless it is there, or without a reason of the caller's, Transformers' own ResNet can take the place.

    Raises:
        DetectorLoadError: the backbone is timm's, and timm is not installed or cannot be imported.
    """
    timm = timm_backbone(config)
    reason = None if timm is None else reason or why_not_native(timm)
    problem = None if reason is None else _why_no_timm()
    if problem is not None:
        raise DetectorLoadError(f"{what} has a timm backbone ({timm.backbone!r}: {reason}) and timm {problem}")


def _why_no_timm() -> str | None:
    """Why timm cannot be used, and what to do; None where it can."""
    if importlib.util.find_spec("timm") is None:
        return "is not installed: pip install timm, which needs the torchvision of torch's version and build"
    try:
        importlib.import_module("timm")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"cannot be imported ({one_line(error)}): {PUT_RIGHT}"
    return None


def why_not_native(backbone: Any) -> str | None:
    """Why Transformers' own ResNet cannot take the place of a timm backbone; None where it can.

    Args:
        backbone: a `TimmBackboneConfig`.
    """
    # a tag after the dot names weights, not an architecture: resnet50.a1_in1k
    if str(backbone.backbone).split(".")[0] not in RESNETS:
        return f"Transformers' own ResNet can be a {', '.join(RESNETS)}; others have another stem, block or shortcut"
    if backbone.output_stride not in (None, STRIDE, DILATED_STRIDE):
        return (
            f"its output_stride is {backbone.output_stride}, and only the last stage can be dilated ({DILATED_STRIDE})"
        )
    if 0 in _stages(backbone):
        return "its out_indices name the stem, which Transformers' own gives out after pooling"
    known = set(type(backbone)().to_dict()) | {"use_pretrained_backbone"}
    if further := sorted(set(backbone.to_dict()) - known):
        return f"it has the options {further}"
    return None


def native_resnet(backbone: Any) -> ResNetConfig:
    """Transformers' own ResNet that computes what a timm backbone does, but for dilation.

    Args:
        backbone: a `TimmBackboneConfig` for which `why_not_native` is None.
    """
    layer_type, depths = RESNETS[backbone.backbone.split(".")[0]]
    config = ResNetConfig(
        num_channels=backbone.num_channels,
        depths=list(depths),
        hidden_sizes=list(WIDTHS[layer_type]),
        layer_type=layer_type,
    )
    config.out_features = [f"stage{stage}" for stage in _stages(backbone)]
    return config


def _stages(backbone: Any) -> list[int]:
    """The stages that are given out, from 1; 0 is timm's stem."""
    return [index % 5 for index in backbone.out_indices]


def dilate_last_stage(backbone: Any) -> None:
    """Give the last stage dilation instead of its stride, in place, as timm and torchvision do.

    The convolution that strode looks at its neighbours as before, and every later one of the stage at every second.

    Args:
        backbone: a `ResNetBackbone`.
    """
    strode = False
    for module in backbone.encoder.stages[-1].modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.kernel_size == (3, 3) and strode:
            module.dilation = module.padding = (2, 2)
        strode |= module.kernel_size == (3, 3)
        module.stride = (1, 1)


def copy_dilation(source: nn.Module, target: nn.Module) -> None:
    """Let every convolution of a model stride, dilate and pad as the one of the same name does in another."""
    for name, module in source.named_modules():
        if isinstance(module, nn.Conv2d):
            copy: Any = target.get_submodule(name)
            copy.stride, copy.dilation, copy.padding = module.stride, module.dilation, module.padding
