"""Checkpoints as the authors of DETR and of Conditional DETR publish them (`.pth`), as stock checkpoints.

They are pickles, which `pickled_weights` alone opens: here is what they hold.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ConditionalDetrForObjectDetection, DetrForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.timm_names import DILATED_STRIDE, RESNETS, TIMM_NAMES, WIDTHS

# heads show in no tensor; all that the authors published have so many
HEADS = 8
# a tensor that only this family has, and how many outputs of its class head are no class
FAMILIES_BY_TENSOR: dict[str, tuple[type[PreTrainedModel], int]] = {
    "transformer.decoder.layers.0.sa_qcontent_proj.weight": (ConditionalDetrForObjectDetection, 0),
    "transformer.decoder.layers.0.multihead_attn.in_proj_weight": (DetrForObjectDetection, 1),
}
BACKBONE = "backbone.0.body."
# regular expressions of the authors' names, and Transformers' names for them, applied one after the other
OFFICIAL_NAMES = {
    r"^backbone\.0\.body\.": "model.backbone.model.",
    r"^input_proj\.": "model.input_projection.",
    r"^query_embed\.": "model.query_position_embeddings.",
    r"^class_embed\.": "class_labels_classifier.",
    r"^bbox_embed\.": "bbox_predictor.",
    r"^transformer\.": "model.",
    r"\.decoder\.norm\.": ".decoder.layernorm.",
    r"(layers\.\d+)\.norm1\.": r"\1.self_attn_layer_norm.",
    r"(encoder\.layers\.\d+)\.norm2\.": r"\1.final_layer_norm.",
    r"(decoder\.layers\.\d+)\.norm2\.": r"\1.encoder_attn_layer_norm.",
    r"(decoder\.layers\.\d+)\.norm3\.": r"\1.final_layer_norm.",
    r"\.linear([12])\.": r".mlp.fc\1.",
    r"\.(?:multihead|cross)_attn\.": ".encoder_attn.",
    r"\.sa_([qk])(content|pos)_": r".self_attn.\1_\2_",
    r"\.ca_([qk])(content|pos)_": r".encoder_attn.\1_\2_",
    r"\.sa_v_proj\.": ".self_attn.v_proj.",
    r"\.ca_v_proj\.": ".encoder_attn.v_proj.",
    r"\.out_proj\.": ".o_proj.",
}


def convert_official(
    path: str, content: dict, folder: Path, class_names: list[str], dilated: bool | None = None
) -> PreTrainedConfig:
    """Write a folder with `config.json` and `model.safetensors` that holds what a published checkpoint holds.

    A dilated backbone (DC5) stays one of timm's in the folder, since Transformers' own ResNet cannot be dilated.

    Args:
        path: the `.pth` file, as the errors call it.
        content: what it holds: see `is_of_authors`.
        folder: where to write; it is made.
        class_names: in the order of the class head's outputs.
        dilated: whether the backbone is dilated, which shows in no tensor; None: as the file's options say.

    Raises:
        DetectorLoadError: it is of another model or of other classes.
    """
    tensors, saved_options = content["model"], content.get("args")
    options = vars(saved_options) if isinstance(saved_options, argparse.Namespace) else {}
    dilated = options.get("dilation") if dilated is None else dilated
    if dilated is None:
        raise DetectorLoadError(
            f"{path} does not say whether its backbone is dilated (DC5), which shows in no tensor: say --dilated true "
            "or false"
        )
    stock_class = _stock_class(tensors, options, class_names, path)
    fields = _fields(tensors, options, path) | {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
    model = _native_model(stock_class, fields, tensors, path)
    if not dilated:
        model.save_pretrained(folder)
        return model.config
    model.config.backbone_config, model.config.dilation = _timm_backbone(fields["backbone_config"], path), True
    model.config.architectures = [stock_class.__name__]
    model.config.save_pretrained(folder)
    save_file(_renamed(tensors, OFFICIAL_NAMES), folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
    return model.config


def _stock_class(
    tensors: dict[str, Tensor], options: dict, class_names: list[str], path: str
) -> type[PreTrainedModel]:
    """The class of Transformers that the tensors are of, with so many classes."""
    family = next((found for name, found in FAMILIES_BY_TENSOR.items() if name in tensors), None)
    if family is None:
        raise DetectorLoadError(f"{path} is neither of a Conditional DETR nor of a DETR, by the names of its tensors")
    stock_class, further = family
    outputs = _shape(tensors, "class_embed.weight", path)[0] - further
    if outputs != len(class_names):
        raise DetectorLoadError(
            f"{path} has {outputs} classes, and {len(class_names)} names are given: --classes takes a file with a "
            "name a line, in the order of the outputs"
        )
    if options.get("pre_norm"):
        raise DetectorLoadError(f"{path} was trained with pre_norm, which Transformers' {stock_class.__name__} lacks")
    return stock_class


def _fields(tensors: dict[str, Tensor], options: dict, path: str) -> dict:
    """The fields of the configuration, by the shapes of the tensors; the rest is as the authors have it by default."""
    queries, width = _shape(tensors, "query_embed.weight", path)
    fields = {
        "d_model": width,
        "num_queries": queries,
        "dropout": options.get("dropout", 0.1),
        "auxiliary_loss": False,
    }
    for part in ("encoder", "decoder"):
        fields[f"{part}_layers"] = _count(tensors, rf"transformer\.{part}\.layers\.(\d+)\.")
        fields[f"{part}_ffn_dim"] = _shape(tensors, f"transformer.{part}.layers.0.linear1.weight", path)[0]
        fields[f"{part}_attention_heads"] = options.get("nheads", HEADS)
    bottleneck = f"{BACKBONE}layer1.0.conv3.weight" in tensors
    last = 3 if bottleneck else 2
    fields["backbone_config"] = {
        "model_type": "resnet",
        "layer_type": "bottleneck" if bottleneck else "basic",
        "embedding_size": _shape(tensors, f"{BACKBONE}conv1.weight", path)[0],
        "depths": [_count(tensors, rf"{re.escape(BACKBONE)}layer{stage}\.(\d+)\.") for stage in range(1, 5)],
        "hidden_sizes": [
            _shape(tensors, f"{BACKBONE}layer{stage}.0.conv{last}.weight", path)[0] for stage in range(1, 5)
        ],
        "out_features": ["stage4"],
    }
    return fields


def _native_model(
    stock_class: type[PreTrainedModel], fields: dict, tensors: dict[str, Tensor], path: str
) -> PreTrainedModel:
    """The stock model with every tensor of the file, and no other."""
    with torch.device("meta"):
        model = stock_class(stock_class.config_class(**fields))
    native, expected = _renamed(tensors, OFFICIAL_NAMES | TIMM_NAMES), model.state_dict()
    missing, unknown = sorted(expected.keys() - native.keys()), sorted(native.keys() - expected.keys())
    different = [name for name in expected.keys() & native.keys() if expected[name].shape != native[name].shape]
    if missing or unknown or different:
        raise DetectorLoadError(
            f"{path} does not hold the tensors of a {stock_class.__name__} over a ResNet: {len(missing)} are missing "
            f"{missing[:3]}, {len(unknown)} are none of its own {unknown[:3]}, {len(different)} have another shape "
            f"{sorted(different)[:3]}"
        )
    model.load_state_dict(native, strict=True, assign=True)
    return model


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors by other names, with PyTorch's joint projection of an attention taken apart."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue  # a frozen batch norm counts nothing
        for pattern, target in names.items():
            name = re.sub(pattern, target, name)
        place, joint, leaf = name.partition("in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True) if joint else ()
        renamed |= {f"{place}{letter}_proj.{leaf}": part.clone() for letter, part in parts} or {name: value}
    return renamed


def _timm_backbone(fields: dict, path: str) -> dict:
    """timm's configuration of the dilated ResNet of these fields."""
    kind = fields["layer_type"], tuple(fields["depths"])
    name = next((name for name, known in RESNETS.items() if known == kind), None)
    if name is None or fields["hidden_sizes"] != list(WIDTHS[kind[0]]):
        raise DetectorLoadError(f"{path}: its dilated backbone is none of {', '.join(RESNETS)}, by its tensors")
    options = {"out_indices": [1, 2, 3, 4], "output_stride": DILATED_STRIDE}
    return {"model_type": "timm_backbone", "backbone": name, **options}


def _shape(tensors: dict[str, Tensor], name: str, path: str) -> torch.Size:
    if name not in tensors:
        raise DetectorLoadError(f"{path} lacks the tensor {name}, which every checkpoint of its kind has")
    return tensors[name].shape


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many layers are numbered in names of this form."""
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})
