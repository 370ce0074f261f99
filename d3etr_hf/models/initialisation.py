"""How Conditional DETR starts and what of it trains, as in its authors' code (Transformers does neither)."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import ConditionalDetrForObjectDetection
from transformers.utils import logging

from d3etr_hf.errors import DetectorLoadError

logger = logging.get_logger(__name__)

FOREGROUND_PRIOR = 0.01
# the stem and the first stage of a ResNet, in the names of Transformers' own backbone and of timm's
FROZEN_RESNET_PARTS = ("embedder.", "encoder.stages.0.", "conv1.", "bn1.", "layer1.")


@torch.no_grad()
def initialise_as_in_paper(model: ConditionalDetrForObjectDetection, names: Iterable[str] | None = None) -> None:
    """Set parameters to the start values of Conditional DETR's authors, in place; the backbone is left as it is.

    Every matrix of encoder and decoder Xavier-uniform, object queries N(0, 1), class bias -log 99, last box layer
    zero, the remaining layers of the heads and the input projection as PyTorch initialises them.

    Args:
        model: the detector to initialise.
        names: the parameters to set (as `named_parameters` calls them); all of them by default.
    """
    chosen = set(dict(model.named_parameters()) if names is None else names)

    def pick(module: nn.Module, prefix: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in module.named_parameters(prefix) if name in chosen]

    for part in ("encoder", "decoder"):
        for name, value in pick(model.model.get_submodule(part), f"model.{part}"):
            if value.dim() > 1:
                nn.init.xavier_uniform_(value)
            elif name.endswith("bias"):
                nn.init.zeros_(value)
            else:
                nn.init.ones_(value)  # the weight of a layer norm
    for _, value in pick(model.model.query_position_embeddings, "model.query_position_embeddings"):
        nn.init.normal_(value)
    layers = {"model.input_projection": model.model.input_projection}
    layers |= {"class_labels_classifier": model.class_labels_classifier}
    layers |= {f"bbox_predictor.layers.{i}": layer for i, layer in enumerate(model.bbox_predictor.layers)}
    last_box_layer = f"bbox_predictor.layers.{len(model.bbox_predictor.layers) - 1}"
    for prefix, layer in layers.items():
        if not pick(layer, prefix):
            continue
        layer.reset_parameters()
        if prefix == "class_labels_classifier":
            nn.init.constant_(layer.bias, -math.log((1 - FOREGROUND_PRIOR) / FOREGROUND_PRIOR))
        elif prefix == last_box_layer:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def freeze_as_in_paper(model: ConditionalDetrForObjectDetection) -> None:
    """Set `requires_grad` of every parameter, and log the counts.

    All train but a ResNet's stem and first stage, and what no output depends on: backbone stages after the last that
    is read, and a single decoder layer's query scale (distributed training would wait for their gradients).

    Transformers freezes the whole of its own ResNet on construction and nothing at all after `from_pretrained`, so
    this runs after both.
    """
    backbone = model.model.backbone.model
    frozen_parts = FROZEN_RESNET_PARTS if is_resnet(model.config) else ()
    frozen_parts += unread_stages(model.config.backbone_config)
    model.requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen_parts))
    if model.config.decoder_layers == 1:
        model.model.decoder.query_scale.requires_grad_(False)
    counts = {True: [0, 0], False: [0, 0]}
    for parameter in model.parameters():
        counts[parameter.requires_grad][0] += 1
        counts[parameter.requires_grad][1] += parameter.numel()
    logger.info(
        f"{counts[True][1]:,} parameters in {counts[True][0]} tensors train, "
        f"{counts[False][1]:,} in {counts[False][0]} are frozen"
    )


def unread_stages(backbone_config) -> tuple[str, ...]:
    """Prefixes of the parameters of backbone stages after the last one that the detector reads."""
    if backbone_config.model_type == "timm_backbone":
        return ()
    stages = backbone_config.stage_names
    read = max(stages.index(name) for name in backbone_config.out_features)
    # stage_names starts with the stem; Swin calls its stages layers
    return tuple(f"encoder.{word}.{index}." for index in range(read, len(stages) - 1) for word in ("stages", "layers"))


def is_resnet(config) -> bool:
    """Whether a detector's backbone is a ResNet, Transformers' own or timm's (whose batch norm is frozen)."""
    backbone = config.backbone_config
    return backbone.model_type == "resnet" or (
        backbone.model_type == "timm_backbone" and backbone.backbone.startswith("resnet")
    )


def inherit_from_teacher(
    student: ConditionalDetrForObjectDetection,
    teacher: ConditionalDetrForObjectDetection,
    parts: Iterable[str],
    class_index: torch.Tensor,
    layer_map: list[int],
) -> tuple[list[str], list[str]]:
    """Copy the teacher's weights into the student where shapes allow, in place.

    Args:
        parts: any of "encoder" (with the input projection), "decoder", "heads", "queries".
        class_index: int64 `(C,)`, the teacher's class for each of the student's.
        layer_map: the teacher's decoder layer (from 0) for each of the student's.

    Returns:
        The names of the tensors copied and of those left as they were, for their shapes or depth.

    Raises:
        DetectorLoadError: nothing at all could be copied.
    """
    prefixes = {
        "encoder": ("model.encoder.", "model.input_projection."),
        "decoder": ("model.decoder.",),
        "heads": ("class_labels_classifier.", "bbox_predictor."),
        "queries": ("model.query_position_embeddings.",),
    }
    wanted = tuple(prefix for part in parts for prefix in prefixes[part])
    source = teacher.state_dict()
    copied, skipped = [], []
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if not name.startswith(wanted):
                continue
            origin = name
            if name.startswith("model.decoder.layers."):
                layer, rest = name.removeprefix("model.decoder.layers.").split(".", 1)
                # only a first layer projects the queries' positions, so it comes from a first layer
                first = rest.startswith("encoder_attn.q_pos_proj.")
                origin = f"model.decoder.layers.{0 if first else layer_map[int(layer)]}.{rest}"
            tensor = source.get(origin)
            if tensor is not None and name.startswith("class_labels_classifier."):
                tensor = tensor[class_index.to(tensor.device)]
            if tensor is None or tensor.shape != value.shape:
                skipped.append(name)
                continue
            value.copy_(tensor)
            copied.append(name)
    if not copied:
        raise DetectorLoadError(
            f"inherit_from_teacher={list(parts)}: no tensor of the teacher fits the student (its hidden size is "
            f"{teacher.config.d_model}, the student's {student.config.d_model}); leave the option empty"
        )
    logger.info(f"inherited {len(copied)} tensors from the teacher, kept {len(skipped)} of the student's own")
    return copied, skipped
