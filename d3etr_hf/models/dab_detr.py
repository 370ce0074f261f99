"""DAB-DETR (Liu et al., ICLR 2022)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import DabDetrForObjectDetection
from transformers.models.dab_detr.modeling_dab_detr import (
    DabDetrAttention,
    DetrAttention,
    encode_sinusoidal_position_embedding,
    inverse_sigmoid,
)

from d3etr_hf.losses import DetectionCriterion
from d3etr_hf.models.dense_memory import (
    Memory,
    collect_groups,
    encode,
    focal_criterion,
    join,
    start_groups,
    without_autocast,
)
from d3etr_hf.models.detector import BACKBONE, DECODER, ENCODER, HEADS, QUERIES
from d3etr_hf.models.group_attention import GroupAttention
from d3etr_hf.models.initialisation import FOREGROUND_PRIOR, reset_but, start_at_prior
from d3etr_hf.models.own_attention import OwnAttention, OwnAttentionDetector
from d3etr_hf.models.query_adapters import boxes_of
from d3etr_hf.outputs import OWN, DetectorOutput, GroupRequest, Queries


class GroupDabDetrAttention(OwnAttention, DabDetrAttention):
    """Attention whose queries and keys are projected before it."""

    def forward(self, hidden_states, attention_mask=None, key_states=None, value_states=None, output_attentions=None):
        if self.groups is None:
            return super().forward(hidden_states, attention_mask, key_states, value_states, output_attentions)
        attended = self.attend_apart(
            hidden_states, key_states, value_states, attention_mask, self.attention_heads, self.attention_dropout
        )
        return self.output_proj(attended), None


class D3etrDabDetrForObjectDetection(OwnAttentionDetector, DabDetrForObjectDetection):
    """`DabDetrForObjectDetection` with further query groups and attention maps on demand; see `Detector`.

    Its queries are boxes: they start from no content, or from patterns, each of which comes with every box. The class
    loss weighs as in the authors' code; Transformers does not read `cls_loss_coefficient`. As in both codes
    `random_refpoints_xy` says where boxes start, and does not keep them there.
    """

    stock_class = DabDetrForObjectDetection
    title = "DAB-DETR"
    tag = "dab-detr"
    anchor_size = 4
    makes_anchors = False
    citation = """@inproceedings{liu2022dabdetr,
  title={{DAB}-{DETR}: Dynamic Anchor Boxes are Better Queries for {DETR}},
  author={Liu, Shilong and Li, Feng and Zhang, Hao and Yang, Xiao and Qi, Xianbiao and Su, Hang and Zhu, Jun and
    Zhang, Lei},
  booktitle={International Conference on Learning Representations},
  year={2022}
}"""
    parts = {
        BACKBONE: ("model.backbone.",),
        ENCODER: ("model.encoder.", "model.input_projection."),
        DECODER: tuple(
            f"model.decoder.{name}."
            for name in ("layers", "layernorm", "query_scale", "ref_point_head", "ref_anchor_head")
        ),
        HEADS: ("class_embed.", "bbox_predictor.", "model.decoder.bbox_embed."),
        QUERIES: ("model.query_refpoint_embeddings.", "model.patterns."),
    }
    group_attention = GroupDabDetrAttention
    class_head = "class_embed"
    width_field = "hidden_size"
    skipped_layers = None

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        if config.num_patterns < 0:
            raise ValueError(f"num_patterns is {config.num_patterns}, and must be 0 (none) or more")

    @property
    def query_count(self) -> int:
        return self.config.num_queries * max(1, self.config.num_patterns)

    @property
    def backbone_module(self) -> nn.Module:
        backbone = self.model.backbone.conv_encoder.model
        return backbone._backbone if self.backbone_type == "timm_backbone" else backbone  # timm's in its wrapper

    def attention_modules(self) -> Iterator[tuple[Any, bool]]:
        for layer in self.model.decoder.layers:
            yield layer.self_attn.self_attn, True
            yield layer.cross_attn.cross_attn, False

    def static_queries(self) -> Queries:
        with torch.no_grad(), without_autocast(self.model.query_refpoint_embeddings.weight):
            return self._own_queries()

    def _own_queries(self) -> Queries:
        """Boxes and what each starts from; their position embeddings are for other families."""
        anchors = self._own_anchors().sigmoid()
        sine = encode_sinusoidal_position_embedding(anchors, num_pos_feats=self.width // 2)
        content = torch.zeros_like(anchors[:, :1]).expand(-1, self.width)
        if self.config.num_patterns:
            content = self.model.patterns.weight.repeat_interleave(self.config.num_queries, dim=0)
        return Queries(content, self.model.decoder.ref_point_head(sine), anchors)

    def _own_anchors(self) -> torch.Tensor:
        """`(N, 4)`, before the sigmoid."""
        return self.model.query_refpoint_embeddings.weight.repeat(max(1, self.config.num_patterns), 1)

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        memory = encode(self, pixel_values, pixel_mask)
        # all of the decoder: half precision would round the boxes that it refines
        with without_autocast(memory.tokens):
            own = self._own_queries()
            queries = self.queries_of_groups(own, request)
            groups = start_groups(queries, request)
            decoded = self._decode(memory, queries, groups)
            hidden_states = decoded.intermediate_hidden_states
            logits = self.class_embed(hidden_states)
            boxes = (self.bbox_predictor(hidden_states) + inverse_sigmoid(decoded.reference_points)).sigmoid()
        return collect_groups((logits, boxes, hidden_states), groups, own, memory, request)

    def _decode(self, memory: Memory, queries: dict[str, Queries], groups: GroupAttention):
        """The stock decoder over the queries of all groups."""
        batch, dtype = len(memory.tokens), self.dtype
        anchors = [  # the model's own as they are learned
            self._own_anchors() if name == OWN else boxes_of(group).logit(1e-5) for name, group in queries.items()
        ]
        with self.attending(groups):
            return self.model.decoder(
                inputs_embeds=join((self._content(group) for group in queries.values()), batch).to(dtype),
                query_position_embeddings=join(anchors, batch).to(dtype),
                encoder_hidden_states=memory.tokens.to(dtype),
                object_queries=memory.position.to(dtype),
                memory_key_padding_mask=memory.attention_mask,
            )

    def _content(self, queries: Queries) -> torch.Tensor:
        """What queries start from: nothing, or what another family's hold, without which those that have no boxes
        would all be the same."""
        content = queries.position if queries.content is None else queries.content
        return queries.anchors.new_zeros(len(queries), self.width) if content is None else content

    def new_queries(self, count: int) -> Queries:
        return Queries(anchors=self._drawn_anchors(count).sigmoid())

    def _drawn_anchors(self, count: int) -> torch.Tensor:
        """`(N, 4)`, before the sigmoid: N(0, 1), or centres anywhere."""
        anchors = torch.randn(count, 4)
        if self.config.random_refpoints_xy:
            anchors[:, :2] = torch.rand(count, 2).logit(1e-5)
        return anchors

    def criterion(self) -> DetectionCriterion:
        return focal_criterion(self.config)

    @torch.no_grad()
    def initialise(self, names: Iterable[str] | None = None) -> None:
        """Every matrix of encoder and decoder Xavier-uniform, attention without bias, boxes N(0, 1), classes at a
        prior of 0.01, refinement zero; all else as PyTorch starts it."""
        chosen = set(dict(self.named_parameters(remove_duplicate=False)) if names is None else names)
        config, (encoder, decoder) = self.config, (self.model.encoder, self.model.decoder)
        with reset_but(self, self.backbone_module, chosen):
            for name, value in (*encoder.named_parameters(), *decoder.named_parameters()):
                if value.dim() > 1 and not name.startswith("bbox_embed."):
                    nn.init.xavier_uniform_(value)
            for module in (*encoder.modules(), *decoder.modules()):
                if isinstance(module, DetrAttention | DabDetrAttention):
                    for name, value in module.named_parameters():
                        if name.endswith("bias"):
                            nn.init.zeros_(value)
            anchors = self.model.query_refpoint_embeddings.weight
            anchors.copy_(self._drawn_anchors(len(anchors)))
            start_at_prior(self.class_embed, config.initializer_bias_prior_prob or FOREGROUND_PRIOR)
            nn.init.zeros_(self.bbox_predictor.layers[-1].weight)
            nn.init.zeros_(self.bbox_predictor.layers[-1].bias)

    def freeze(self) -> None:
        """As DETR; query scales that no output depends on do not train either."""
        super().freeze()
        self.model.encoder.query_scale.requires_grad_(self.config.encoder_layers > 0)
        self.model.decoder.query_scale.requires_grad_(self.decoder_depth > 1)

    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        self._keep_outputs(index, names)

    def source_of(self, name: str, layer_map: list[int]) -> str:
        # as a rule only a first layer projects the queries' positions, so it comes from a first layer
        first = ".cross_attn_query_pos_proj." in name and not self.config.keep_query_pos
        return name if first else super().source_of(name, layer_map)
