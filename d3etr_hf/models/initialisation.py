"""What of a detector trains and how it starts, as in its authors' code (Transformers does neither)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from d3etr_hf.models.detector import Detector

# layers that PyTorch starts by themselves
RESET = (
    nn.Linear,
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.PReLU,
)
# the stem and the first stage of a ResNet, in the names of Transformers' own backbone and of timm's
FROZEN_RESNET_PARTS = ("embedder.", "encoder.stages.0.", "conv1.", "bn1.", "layer1.")
FOREGROUND_PRIOR = 0.01


def freeze_backbone_as_detr(model: Detector, backbone, backbone_config) -> None:
    """Let everything train but a ResNet's stem and first stage, and stages that no output depends on.

    Distributed training would wait for the gradients of the latter. Transformers freezes the whole of its own ResNet
    on construction and nothing at all after `from_pretrained`, so this runs after both.

    Args:
        backbone: the model's backbone module.
        backbone_config: its configuration.
    """
    frozen_parts: tuple[str, ...] = FROZEN_RESNET_PARTS if is_resnet(backbone_config) else ()
    frozen_parts += unread_stages(backbone_config)
    model.requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen_parts))


def freeze_stem(model: Detector, backbone, config) -> None:
    """Let everything train but unread stages and, where the configuration freezes the backbone's batch norm, its stem.

    As RT-DETR's and D-FINE's authors: their large backbones have both frozen, the small ones neither.

    Args:
        backbone: the model's backbone module.
        config: the model's configuration.
    """
    frozen = unread_stages(config.backbone_config)
    frozen += ("embedder.",) if config.freeze_backbone_batch_norms else ()
    model.requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))


def unread_stages(backbone_config) -> tuple[str, ...]:
    """Prefixes of the parameters of backbone stages after the last one that the detector reads."""
    if backbone_config.model_type == "timm_backbone":
        return ()
    stages = backbone_config.stage_names
    read = max(stages.index(name) for name in backbone_config.out_features)
    # stage_names starts with the stem; Swin calls its stages layers, a plain vision transformer's are its layers
    words = ("stages", "layers", "layer")
    return tuple(f"encoder.{word}.{index}." for index in range(read, len(stages) - 1) for word in words)


def is_resnet(backbone_config) -> bool:
    """Whether a backbone is a ResNet, Transformers' own or timm's (whose batch norm is frozen)."""
    return backbone_config.model_type == "resnet" or (
        backbone_config.model_type == "timm_backbone" and backbone_config.backbone.startswith("resnet")
    )


@contextmanager
def reset_but(model: Detector, backbone: nn.Module, chosen: set[str]) -> Iterator[None]:
    """Give all layers outside the backbone PyTorch's own start values; afterwards what was not chosen is as it was.

    Within the context a family sets what its authors set otherwise.

    Args:
        chosen: names of the parameters that start afresh; of tied ones any name.
    """
    inside = set(backbone.modules())
    fresh = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in chosen}
    kept = {name: value.clone() for name, value in model.named_parameters() if id(value) not in fresh}
    kept |= {name: value.clone() for name, value in backbone.named_parameters("backbone")}
    # resetting batch norm would also forget the statistics that came with a checkpoint
    kept |= {name: value.clone() for name, value in model.named_buffers()}
    for module in model.modules():
        if module not in inside and isinstance(module, RESET):
            module.reset_parameters()
    yield
    own = dict(model.named_parameters()) | dict(backbone.named_parameters("backbone")) | dict(model.named_buffers())
    for name, value in kept.items():
        own[name].copy_(value)


def start_as_multihead_attention(attention: Any) -> None:
    """Start the four projections of an attention module as `torch.nn.MultiheadAttention` starts them, in place.

    There queries, keys and values share one Xavier-uniform matrix, and no bias starts elsewhere than at zero. The last
    projection's weight is left as it is, which is as any linear layer's.
    """
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    width = attention.q_proj.in_features
    bound = math.sqrt(6 / (width + sum(projection.out_features for projection in inputs)))
    for projection in inputs:
        nn.init.uniform_(projection.weight, -bound, bound)
    for projection in (*inputs, attention.o_proj):
        nn.init.zeros_(projection.bias)


def start_at_prior(class_head: Any, prior: float = FOREGROUND_PRIOR) -> None:
    """Let every sigmoid class of a linear head start near this probability (RetinaNet, section 4.1), in place."""
    nn.init.constant_(class_head.bias, -math.log((1 - prior) / prior))
