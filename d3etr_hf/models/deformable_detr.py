"""Deformable DETR (Zhu et al., ICLR 2021)."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DeformableDetrForObjectDetection
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrLearnedPositionEmbedding,
    DeformableDetrMultiscaleDeformableAttention,
    eager_attention_forward,
    inverse_sigmoid,
)

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.losses import DetectionCriterion, FocalCriterion
from d3etr_hf.models.detector import BACKBONE, DECODER, ENCODER, HEADS, QUERIES
from d3etr_hf.models.group_decoder import DecoderPass, GroupDecoder, sampled_in, without_padding
from d3etr_hf.models.initialisation import freeze_backbone_as_detr, start_as_multihead_attention, start_at_prior
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

# the authors' cls_loss_coef; Transformers' configuration has no such field, and its loss weighs classes 1
CLASS_WEIGHT = 2.0
# of a first layer's box sides, before the sigmoid, where boxes start at points
FIRST_SIDES = -2.0
# what Transformers starts as the authors do
KEPT_AS_STOCK = (DeformableDetrMultiscaleDeformableAttention, DeformableDetrLearnedPositionEmbedding)


class GroupDeformableDetrDecoder(GroupDecoder, DeformableDetrDecoder):
    """Deformable DETR's decoder for several groups: queries are content, position, and points or boxes in 0..1."""

    query_arguments = ("inputs_embeds", "object_queries_position_embeddings", "reference_points")

    def own_groups(self, count: int) -> dict[str, int]:
        return {OWN: count}

    def queries_from(self, arguments: Mapping[str, torch.Tensor]) -> Queries:
        parts = [arguments[name] for name in self.query_arguments]
        return Queries(*(parts if self.config.two_stage else (part[0] for part in parts)))  # one stage: of any image

    def arguments_from(self, queries: Queries) -> dict[str, Any]:
        parts = queries.content, queries.position, queries.anchors  # all there: the model has completed them
        return dict(zip(self.query_arguments, parts, strict=True))

    def sampling_modules(self) -> list[nn.Module]:
        return [layer.get_submodule("encoder_attn.attn") for layer in self.layers]

    def sampled_by(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output) -> SampledAttention:
        return sampled_in(*args[4:6])

    def in_the_image(self, sampled: SampledAttention, arguments: Mapping[str, Any]) -> SampledAttention:
        return without_padding(sampled, arguments["valid_ratios"])


class D3etrDeformableDetrForObjectDetection(SampledMemoryDetector, DeformableDetrForObjectDetection):
    """`DeformableDetrForObjectDetection` with further query groups and attention on demand; see `Detector`.

    As the authors and unlike Transformers, the class loss weighs 2, and ground truth supervises the proposals of a
    two-stage model, all tokens of the memory, as objects of one class: without it their heads would stay as they are.
    As Transformers and unlike the authors, the layers of a new one-stage model share one class head with box
    refinement, too; a checkpoint that brings one for each keeps them.
    """

    stock_class = DeformableDetrForObjectDetection
    title = "Deformable DETR"
    tag = "deformable-detr"
    reads_padding = True
    citation = """@inproceedings{zhu2021deformable,
  title={Deformable {DETR}: Deformable Transformers for End-to-End Object Detection},
  author={Zhu, Xizhou and Su, Weijie and Lu, Lewei and Li, Bin and Wang, Xiaogang and Dai, Jifeng},
  booktitle={International Conference on Learning Representations},
  year={2021}
}"""
    parts = {
        BACKBONE: ("model.backbone.",),
        ENCODER: ("model.encoder.", "model.input_proj.", "model.level_embed", "model.position_embedding."),
        HEADS: ("class_embed.", "bbox_embed.", "model.decoder.class_embed.", "model.decoder.bbox_embed."),
        DECODER: ("model.decoder.layers.", "model.reference_points."),
        QUERIES: ("model.query_position_embeddings.", "model.enc_output", "model.pos_trans"),
    }
    group_decoder = GroupDeformableDetrDecoder
    eager_attention = staticmethod(eager_attention_forward)
    class_outputs = ("class_embed.", "model.decoder.class_embed.")
    layer_modules = ("model.decoder.layers.", *parts[HEADS])
    class_embed: Any
    bbox_embed: Any

    @property
    def query_count(self) -> int:
        return self.config.two_stage_num_proposals if self.config.two_stage else self.config.num_queries

    @property
    def anchor_size(self) -> int:
        return 4 if self.config.two_stage else 2

    @property
    def makes_anchors(self) -> bool:
        return not self.config.two_stage

    @property
    def backbone_module(self) -> nn.Module:
        return self.model.backbone.model

    @classmethod
    def check_config(cls, config) -> None:
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(config, name)
            if heads < 1 or config.d_model % heads:
                raise ValueError(f"d_model {config.d_model} must be a multiple of {name}, which is {heads}")
        if config.d_model % 32:
            raise ValueError(f"d_model {config.d_model} must be a multiple of 32, the groups of its group norms")
        if config.decoder_layers < 2 and not config.two_stage:
            raise ValueError(
                f"decoder_layers is {config.decoder_layers}: Transformers ties heads of at least two layers"
            )
        given = len(config.backbone_config.out_indices)
        if given > config.num_feature_levels:
            raise ValueError(
                f"num_feature_levels is {config.num_feature_levels}, and backbone_config's out_features give {given} "
                "feature maps: there must be a level for each"
            )
        if config.with_box_refine and not config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is false: with_box_refine needs box heads tied to the decoder's own")

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        with ExitStack() as hooks:
            hooks.enter_context(self.model.encoder.register_forward_pre_hook(self._check_memory, with_kwargs=True))
            for projection in self.model.input_proj:
                hooks.enter_context(projection.register_forward_hook(self._in_full_precision))
            return super().forward_groups(pixel_values, pixel_mask, request)

    def _check_memory(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = kwargs["inputs_embeds"].shape[1]
        if self.config.two_stage and tokens < self.query_count:
            raise ImageSizeError(
                f"two_stage_num_proposals is {self.query_count}, but the memory of these images has only {tokens} "
                "tokens: take larger images or fewer queries"
            )

    def _in_full_precision(self, projection: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Group norms leave autocast, on CPUs too: the stock model computes shares of padding in their precision."""
        return output.to(self.dtype)

    def predictions(self, output, decoder_pass: DecoderPass) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads over all groups, as the stock class applies them: a layer's boxes start at the last layer's."""
        logits, boxes, anchors = [], [], decoder_pass.arguments["reference_points"]
        for layer, hidden in enumerate(output.intermediate_hidden_states.unbind(1)):
            offsets, known = self.bbox_embed[layer](hidden), anchors.shape[-1]
            moved = offsets[..., :known] + inverse_sigmoid(anchors)
            boxes.append(torch.cat([moved, offsets[..., known:]], dim=-1).sigmoid())
            logits.append(self.class_embed[layer](hidden))
            anchors = output.intermediate_reference_points[:, layer]
        return torch.stack(logits), torch.stack(boxes)

    def supervised(
        self, outputs: dict[str, GroupOutput], output, decoder_pass: DecoderPass, request: GroupRequest
    ) -> dict[str, Supervised]:
        """A two-stage model's proposals, one a token; those on padding and at the border are a box at the corner."""
        if output.enc_outputs_class is None:
            return {}
        boxes = output.enc_outputs_coord_logits.sigmoid()
        targets = request.targets
        if targets is not None:
            targets = replace(targets, class_labels=torch.zeros_like(targets.class_labels))
        group = GroupOutput(logits=wide(output.enc_outputs_class)[None], boxes=wide(boxes)[None])
        return {"proposals": Supervised(group=group, targets=targets)}

    def queries_of_groups(self, own: Queries, request: GroupRequest) -> dict[str, Queries]:
        groups = super().queries_of_groups(own, request)
        return {name: queries if name == OWN else self._completed(queries) for name, queries in groups.items()}

    def _completed(self, queries: Queries) -> Queries:
        """Any model's queries with content, position and anchors.

        What only one of content and position says stands for both, but in two-stage models positions are made of
        boxes; of a one-stage model's queries points are made, where none are given.
        """
        content = queries.position if queries.content is None else queries.content
        if self.config.two_stage:
            boxes = boxes_of(queries)
            return Queries(content, self._position_of(boxes) if queries.position is None else queries.position, boxes)
        position = content if queries.position is None else queries.position
        if queries.anchors is not None:
            return Queries(content, position, queries.anchors[..., :2])
        return Queries(content, position, self.model.reference_points(position.to(self.dtype)).sigmoid())

    def _position_of(self, boxes: torch.Tensor) -> torch.Tensor:
        """Of boxes `(N, 4)` or `(B, N, 4)`, as of the model's own proposals: `(1, N, d)` or `(B, N, d)`."""
        sine = self.model.get_proposal_pos_embed(inverse_sigmoid(boxes.reshape(-1, *boxes.shape[-2:])))
        return self.model.pos_trans_norm(self.model.pos_trans(sine.to(self.dtype)))[..., : self.width]

    def static_queries(self) -> Queries | None:
        if self.config.two_stage:
            return None
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            position, content = self.model.query_position_embeddings.weight.split(self.width, dim=1)
            return self._completed(Queries(content, position))

    def new_queries(self, count: int) -> Queries:
        if self.config.two_stage:
            return super().new_queries(count)
        return Queries(content=torch.randn(count, self.width), position=torch.randn(count, self.width))

    def criterion(self) -> DetectionCriterion:
        config = self.config
        return FocalCriterion(
            class_cost=config.class_cost,
            l1_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            class_weight=CLASS_WEIGHT,
            l1_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            alpha=config.focal_alpha,
        )

    def start_values(self) -> None:
        """Matrices Xavier-uniform, places sampled around each query, classes at a prior of 0.01, boxes at anchors."""
        model, two_stage = self.model, self.config.two_stage
        chosen = (model.enc_output, model.pos_trans) if two_stage else (model.reference_points,)
        for part in (model.encoder, model.decoder.layers, *chosen):
            for value in part.parameters():
                if value.dim() > 1:
                    nn.init.xavier_uniform_(value)
        for layer in model.decoder.layers:
            start_as_multihead_attention(layer.self_attn)
        for module in model.modules():
            if isinstance(module, KEPT_AS_STOCK):
                self._init_weights(module)
        if not two_stage:
            nn.init.zeros_(model.reference_points.bias)
        nn.init.normal_(model.level_embed)
        for projection in model.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for head in self.class_embed:
            start_at_prior(head)
        for head in self.bbox_embed:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        if not two_stage:
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], FIRST_SIDES)

    def freeze(self) -> None:
        """All train but a ResNet's stem and first stage, and the embedding of levels where no encoder reads it."""
        freeze_backbone_as_detr(self, self.backbone_module, self.config.backbone_config)
        self.model.level_embed.requires_grad_(self.config.encoder_layers > 0)

    @property
    def nameless_outputs(self) -> tuple[str, ...]:
        """Of two stages the proposals' head."""
        head = f"class_embed.{self.decoder_depth}."
        return (head, f"model.decoder.{head}") if self.config.two_stage else ()

    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        if self.config.two_stage:  # the first of the proposals' outputs says whether there is an object
            with torch.no_grad():
                for value in self.class_embed[-1].parameters():
                    value[index] = value[: len(index)].clone()
        super().keep_classes(index, names)
