"""What the families with one dense memory share: DETR and its direct heirs in Transformers have the same encoder."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from d3etr_hf.losses import FocalCriterion
from d3etr_hf.models.detector import BACKBONE, DECODER, ENCODER, HEADS, QUERIES, Detector
from d3etr_hf.models.group_attention import GroupAttention, implementation_of, route_attention
from d3etr_hf.models.initialisation import freeze_backbone_as_detr
from d3etr_hf.outputs import DetectorOutput, GroupOutput, GroupRequest, MemoryLevel, Queries, wide

# where they are learned
POSITION_EMBEDDINGS = ("model.position_embedding.", "model.backbone.position_embedding.")


class Memory(NamedTuple):
    """The encoder's output for a batch.

    Attributes:
        tokens: `(B, H*W, d)`.
        position: their position embeddings, `(B, H*W, d)`.
        mask: bool `(B, H, W)`, true on the image.
    """

    tokens: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor

    @property
    def attention_mask(self) -> torch.Tensor:
        """bool `(B, 1, 1, H*W)`, for every head and query. Made here: the stock one reads the mask on the host."""
        return self.mask.flatten(1)[:, None, None]

    def as_level(self) -> MemoryLevel:
        """The tokens as a map."""
        return MemoryLevel(self.tokens.mT.unflatten(-1, self.mask.shape[1:]), self.mask)


class AssumeFinite(TorchFunctionMode):
    """Answers `torch.isfinite(...).all()` by yes.

    Stock encoder layers ask it in training, and the host waits for the device once a layer. The trainer looks once a
    step whether the loss is finite; that is enough.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.isfinite:
            return np.True_  # has `all`, too
        return func(*args, **(kwargs or {}))


def encode(model: "DenseMemoryDetector", pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> Memory:
    """Backbone and encoder, as the stock forward pass runs them."""
    if pixel_mask is None:
        pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.int64)
    features, mask, position = model.see(pixel_values, pixel_mask)
    tokens = model.model.input_projection(features).flatten(2).transpose(1, 2)
    memory = Memory(tokens, position.flatten(2).mT, mask)
    with nullcontext() if torch.compiler.is_compiling() else AssumeFinite():
        encoded = model.model.encoder(inputs_embeds=tokens, **model.encoder_arguments(memory))
    return memory._replace(tokens=encoded.last_hidden_state)


def start_groups(queries: dict[str, Queries], request: GroupRequest) -> GroupAttention:
    """How these groups share one decoder pass."""
    sizes = {name: len(group) for name, group in queries.items()}
    return GroupAttention(sizes, request.self_attention, request.cross_attention)


def join(parts: Iterable[torch.Tensor], batch: int) -> torch.Tensor:
    """Queries of several groups, `(N, d)` or `(B, N, d)` each, as one `(B, sum of N, d)`."""
    return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)


def collect_groups(
    predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    groups: GroupAttention,
    own: Queries,
    memory: Memory,
    request: GroupRequest,
) -> DetectorOutput:
    """Logits, boxes and normed hidden states of all groups, `(L, B, sum of N, ·)` each, and maps as one output."""
    groups.open = False
    logits, boxes, hidden_states = predictions
    logits_of, boxes_of = groups.split(wide(logits), 2), groups.split(wide(boxes), 2)
    states_of = groups.split(wide(hidden_states[-1]), 1) if request.hidden_states else {}
    outputs = {
        name: GroupOutput(
            logits=logits_of[name], boxes=boxes_of[name], hidden_states=states_of.get(name), **groups.maps_of(name)
        )
        for name in groups.sizes
    }
    levels = (memory.as_level(),) if request.memory else None
    return DetectorOutput(groups=outputs, queries=own, memory_mask=memory.mask, memory=levels)


def focal_criterion(config) -> FocalCriterion:
    """Conditional DETR's and DAB-DETR's criterion, as a configuration of theirs weighs it."""
    return FocalCriterion(
        class_cost=config.class_cost,
        l1_cost=config.bbox_cost,
        giou_cost=config.giou_cost,
        class_weight=config.cls_loss_coefficient,
        l1_weight=config.bbox_loss_coefficient,
        giou_weight=config.giou_loss_coefficient,
        alpha=config.focal_alpha,
    )


def without_autocast(tensor: torch.Tensor):
    """The context in which heads run: half precision would round a small object's box by a tenth of its size."""
    return torch.autocast(tensor.device.type, enabled=False)


class DenseMemoryDetector(Detector):
    """A family whose decoder reads one dense memory and whose queries are learned.

    Attributes:
        eager_attention: its eager attention function, where its decoder asks Transformers' attention interface.
        class_head: name of its class head.
        width_field: what its configuration calls the hidden size.
    """

    parts = {
        BACKBONE: ("model.backbone.model.", "model.backbone.conv_encoder."),
        ENCODER: ("model.encoder.", "model.input_projection.", *POSITION_EMBEDDINGS),
        DECODER: ("model.decoder.",),
        HEADS: ("class_labels_classifier.", "bbox_predictor."),
        QUERIES: ("model.query_position_embeddings.",),
    }
    eager_attention: ClassVar[Callable]
    class_head: ClassVar[str] = "class_labels_classifier"
    width_field: ClassVar[str] = "d_model"
    model: Any
    class_labels_classifier: nn.Linear
    bbox_predictor: Any

    _supports_flash_attn = False
    _supports_flex_attn = False

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def skipped_layers(self) -> str | None:
        dropout = self.config.decoder_layerdrop
        return f"decoder_layerdrop is {dropout}" if dropout > 0 else None

    @property
    def backbone_module(self) -> nn.Module:
        return self.model.backbone.model

    @classmethod
    def check_config(cls, config) -> None:
        width = config.hidden_size
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(config, name)
            if heads < 1 or width % heads:
                raise ValueError(f"{cls.width_field} {width} must be a multiple of {name}, which is {heads}")
        if width % 4:
            raise ValueError(f"{cls.width_field} {width} must be a multiple of 4, for its sine embeddings")

    def prepare_attention(self) -> None:
        layers = self.model.decoder.layers
        self_attention = [layer.self_attn for layer in layers]
        route_attention(
            self.config, self_attention, [layer.encoder_attn for layer in layers], type(self).eager_attention
        )

    def see(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The backbone's features `(B, c, H, W)`, their mask, bool `(B, H, W)`, and positions `(B, d, H, W)`."""
        features, mask = self.model.backbone(pixel_values, pixel_mask)[-1]
        position = self.model.position_embedding(
            shape=features.shape, device=features.device, dtype=pixel_values.dtype, mask=mask
        )
        return features, mask, position

    def encoder_arguments(self, memory: Memory) -> dict[str, torch.Tensor]:
        """What the encoder takes beside the tokens."""
        # scaled-dot-product attention takes the mask as it is; any other implementation makes one of its own kind
        fused = implementation_of(self.model.encoder.config) == "sdpa"
        mask = memory.attention_mask if fused else memory.mask.flatten(1)
        return {"attention_mask": mask, "spatial_position_embeddings": memory.position}

    def normed_layers(self, position: torch.Tensor, run: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The normed hidden states of every decoder layer, `(L, B, sum of N, d)`, from zeros.

        The original records norm(output) on the side. A configuration with `auxiliary_loss` means a checkpoint that
        was trained as Transformers computes it then: the norm feeds the next layer, and the last one is normed twice.

        Args:
            position: of all queries, `(B, sum of N, d)`.
            run: applies a layer, by its index, to hidden states of the same shape.
        """
        decoder, normed_between = self.model.decoder, self.config.auxiliary_loss
        hidden_states, per_layer = torch.zeros_like(position), []
        for index in range(self.decoder_depth):
            hidden_states = run(index, hidden_states)
            per_layer.append(decoder.layernorm(hidden_states))
            if normed_between:
                hidden_states = per_layer[-1]
        if normed_between:
            per_layer[-1] = decoder.layernorm(hidden_states)
        return torch.stack(per_layer)

    def new_queries(self, count: int) -> Queries:
        return Queries(position=torch.randn(count, self.width))

    @torch.no_grad()
    def initialise(self, names: Iterable[str] | None = None) -> None:
        """Every matrix of encoder and decoder Xavier-uniform, object queries N(0, 1), heads and the input projection
        as PyTorch initialises them."""
        chosen = set(dict(self.named_parameters()) if names is None else names)
        for part in ("model.encoder", "model.decoder"):
            for name, value in self.get_submodule(part).named_parameters(part):
                if name not in chosen:
                    continue
                if value.dim() > 1:
                    nn.init.xavier_uniform_(value)
                elif name.endswith("bias"):
                    nn.init.zeros_(value)
                elif name.endswith("norm.weight"):
                    nn.init.ones_(value)
        if "model.query_position_embeddings.weight" in chosen:
            nn.init.normal_(self.model.query_position_embeddings.weight)
        for name in ("model.input_projection", self.class_head, *self.box_layers):
            if self._is_new(name, chosen):
                layer: Any = self.get_submodule(name)
                layer.reset_parameters()

    @property
    def box_layers(self) -> list[str]:
        """Names of the box head's layers."""
        return [f"bbox_predictor.layers.{index}" for index in range(len(self.bbox_predictor.layers))]

    def _is_new(self, layer: str, chosen: set[str]) -> bool:
        return any(f"{layer}.{leaf}" in chosen for leaf, _ in self.get_submodule(layer).named_parameters())

    def freeze(self) -> None:
        """All train but a ResNet's stem and first stage, and backbone stages after the last that is read."""
        freeze_backbone_as_detr(self, self.backbone_module, self.config.backbone_config)

    def _keep_outputs(self, index: torch.Tensor, names: list[str]) -> None:
        """Leave these outputs of the class head, in this order, and name the classes."""
        head: Any = self.get_submodule(self.class_head)
        kept = nn.Linear(head.in_features, len(index), device=head.weight.device, dtype=head.weight.dtype)
        with torch.no_grad():
            kept.weight.copy_(head.weight[index])
            kept.bias.copy_(head.bias[index])
        setattr(self, self.class_head, kept)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: label for label, name in enumerate(names)}

    @staticmethod
    def position_of(queries: Queries) -> torch.Tensor:
        """Position embeddings of any family's queries: learned content serves where there is no position."""
        return queries.content if queries.position is None else queries.position
