"""What the families share that train with Group DETR: RF-DETR and LW-DETR, one stock decoder under two names.

Group DETR (Chen et al., ICCV 2023): training decodes `group_detr` groups of queries that cannot see each other, each
with proposals of its own and each asked for every object; inference keeps the first.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.losses import DetectionCriterion, IouAwareCriterion
from d3etr_hf.models.detector import BACKBONE, DECODER, ENCODER, HEADS, QUERIES
from d3etr_hf.models.group_attention import GroupAttention, query_group_attention
from d3etr_hf.models.group_decoder import DecoderPass, GroupDecoder, sampled_in, without_padding
from d3etr_hf.models.initialisation import freeze_backbone_as_detr, start_at_prior
from d3etr_hf.models.query_adapters import boxes_of
from d3etr_hf.models.sampled_memory import SampledMemoryDetector
from d3etr_hf.outputs import (
    OWN,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    Queries,
    SampledAttention,
    Supervised,
    wide,
)


class GroupDetrAttention(nn.Module):
    """Stands before the stock self-attention, which in training splits its queries into groups of one size."""

    attention_dropout: float
    scaling: float
    head_dim: int
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    def forward(self, hidden_states, position_embeddings=None, groups: GroupAttention | None = None, **kwargs):
        """As the stock class, or with `groups` over queries `(B, sum of N, d)` of any groups."""
        if groups is None:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        placed = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            projection(states).view(heads).transpose(1, 2)
            for projection, states in ((self.q_proj, placed), (self.k_proj, placed), (self.v_proj, hidden_states))
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended, _ = query_group_attention(self, query, key, value, None, dropout, self.scaling, groups)
        return self.o_proj(attended.flatten(2)), None


class GroupDetrDecoder(GroupDecoder):
    """Queries are learned content and boxes, cxcywh in 0..1 of the unpadded image (which nothing keeps within it)."""

    query_arguments = ("inputs_embeds", "reference_points")
    layers: Any
    config: Any

    def own_groups(self, count: int) -> dict[str, int]:
        queries = self.config.num_queries
        return {OWN: queries} | {f"group {number}": queries for number in range(2, count // queries + 1)}

    def see(self, groups: GroupAttention, arguments: dict[str, Any]) -> None:
        groups.alike = tuple(self.own_groups(arguments["inputs_embeds"].shape[1]))

    def queries_from(self, arguments) -> Queries:
        return Queries(content=arguments["inputs_embeds"], anchors=arguments["reference_points"])

    def arguments_from(self, queries: Queries) -> dict[str, torch.Tensor]:
        content = queries.position if queries.content is None else queries.content
        return {"inputs_embeds": content, "reference_points": boxes_of(queries)}

    def sampling_modules(self) -> list[nn.Module]:
        return [layer.cross_attn.attn for layer in self.layers]

    def sampled_by(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output) -> SampledAttention:
        return sampled_in(*args[4:6])

    def in_the_image(self, sampled: SampledAttention, arguments: Mapping[str, Any]) -> SampledAttention:
        return without_padding(sampled, arguments["valid_ratios"])


class GroupDetrDetector(SampledMemoryDetector):
    """A family with LW-DETR's decoder, whose memory is a projection of its backbone's features.

    In training the groups after the first and the proposals of all groups are what only ground truth supervises; the
    detection loss of the model's own group is one part in `group_detr` of all groups', as the authors have it.
    """

    parts = {
        BACKBONE: ("model.backbone.backbone.",),
        ENCODER: ("model.backbone.projector.",),
        HEADS: ("class_embed.", "bbox_embed."),
        DECODER: ("model.decoder.",),
        QUERIES: ("model.reference_point_embed.", "model.query_feat.", "model.enc_out"),
    }
    memory_module = "model.backbone"
    class_outputs = ("class_embed", "model.enc_out_class_embed.")
    reads_padding = True
    group_self_attention: ClassVar[type[GroupDetrAttention]]
    refine: ClassVar[Any]
    config: Any
    class_embed: nn.Linear
    bbox_embed: Any

    # what a family says

    @property
    @abstractmethod
    def side_divisor(self) -> int:
        """As everywhere: here so many windows of so many patches, pixels."""

    @property
    @abstractmethod
    def strides(self) -> list[float]:
        """Pixels between the cells of each level of the memory."""

    # what both share

    @property
    def memory_levels(self) -> int:
        return len(self.strides)

    @classmethod
    def check_config(cls, config) -> None:
        backbone, expected = config.backbone_config, cls.stock_class.config_class().backbone_config.model_type
        if backbone.model_type != expected:
            raise ValueError(f"backbone_config is a {backbone.model_type}; the family is built on {expected} alone")
        if config.d_model % 4:
            raise ValueError(f"d_model {config.d_model} must be a multiple of 4, for its sine embeddings")
        if backbone.hidden_size % backbone.num_attention_heads:
            raise ValueError(
                f"backbone_config: hidden_size {backbone.hidden_size} must be a multiple of num_attention_heads, "
                f"which is {backbone.num_attention_heads}"
            )
        for name in ("group_detr", "num_queries", "decoder_layers", "decoder_self_attention_heads"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} is {getattr(config, name)}; it must be 1 or more")
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(backbone, name), int):
                raise ValueError(f"backbone_config: {name} is {getattr(backbone, name)}; it must be one number")

    @property
    def backbone_module(self) -> nn.Module:
        return self.model.backbone.backbone

    def prepare_attention(self) -> None:
        super().prepare_attention()
        for layer in self.model.decoder.layers:
            layer.self_attn.__class__ = self.group_self_attention

    def check_image(self, height: int, width: int) -> None:
        divisor = self.side_divisor
        if height % divisor or width % divisor:
            raise ImageSizeError(
                f"an image of {width} x {height} pixels: {self.title}'s backbone splits it into windows of patches, "
                f"so both sides must be multiples of {divisor}; resize images to such a size"
            )
        tokens = sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in self.strides)
        self.check_tokens(tokens, height, width)

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        output = super().forward_groups(pixel_values, pixel_mask, request)
        output.repeats = self.config.group_detr if self.training else None
        return output

    def predictions(self, output, decoder_pass: DecoderPass) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes of every layer are offsets of the same ones, which the decoder was given."""
        hidden_states = output.intermediate_hidden_states
        given = decoder_pass.arguments["reference_points"]
        return self.class_embed(hidden_states), type(self).refine(given, self.bbox_embed(hidden_states))

    def supervised(
        self, outputs: dict[str, GroupOutput], output, decoder_pass: DecoderPass, request: GroupRequest
    ) -> dict[str, Supervised]:
        """The proposals of all groups and the predictions of those after the first, group by group, as if layers."""
        count = self.config.group_detr
        hidden_states = output.enc_outputs_class.unflatten(1, (count, -1)).unbind(1)
        heads = zip(self.model.enc_out_class_embed, hidden_states, strict=True)
        proposals = GroupOutput(
            logits=wide(torch.stack([head(states) for head, states in heads])),
            boxes=wide(output.enc_outputs_coord_logits.unflatten(1, (count, -1)).transpose(0, 1)),
        )
        found = {"proposals": Supervised(group=proposals, repeats=count)}
        if further := [outputs[name] for name in decoder_pass.groups.alike[1:]]:
            logits, boxes = (torch.cat(parts) for parts in zip(*((g.logits, g.boxes) for g in further), strict=True))
            found["further_groups"] = Supervised(
                group=GroupOutput(logits=logits, boxes=boxes), repeats=count, of_group=True
            )
        return found

    def criterion(self) -> DetectionCriterion:
        config = self.config
        return IouAwareCriterion(
            class_cost=config.class_cost,
            l1_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            class_weight=config.class_loss_coefficient,
            l1_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            score_exponent=config.focal_alpha,
        )

    def start_values(self) -> None:
        """Matrices of the decoder Xavier-uniform, sampling as in Deformable DETR, classes at a prior of 0.01; boxes
        start at their anchors, those at the proposals, and each group's proposal heads as copies of the decoder's."""
        model = self.model
        for part in (model.decoder, model.enc_output):
            for value in part.parameters():
                if value.dim() > 1:
                    nn.init.xavier_uniform_(value)
        for layer in model.decoder.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))  # three in one in the authors' code
            for name, value in attention.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(value)
            self._init_weights(layer.cross_attn)
        nn.init.zeros_(model.reference_point_embed.weight)
        start_at_prior(self.class_embed)
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)
        for class_head, box_head in zip(model.enc_out_class_embed, model.enc_out_bbox_embed, strict=True):
            class_head.load_state_dict(self.class_embed.state_dict())
            box_head.load_state_dict(self.bbox_embed.state_dict())

    def freeze(self) -> None:
        """All train but backbone layers after the last that is read."""
        freeze_backbone_as_detr(self, self.backbone_module, self.config.backbone_config)
