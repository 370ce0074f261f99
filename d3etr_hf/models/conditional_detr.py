"""Conditional DETR (Meng et al., ICCV 2021)."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import ConditionalDetrForObjectDetection
from transformers.models.conditional_detr.modeling_conditional_detr import (
    eager_attention_forward,
    encode_sinusoidal_position_embedding,
    inverse_sigmoid,
)

from d3etr_hf.losses import DetectionCriterion
from d3etr_hf.models.dense_memory import (
    DenseMemoryDetector,
    Memory,
    collect_groups,
    encode,
    focal_criterion,
    join,
    start_groups,
    without_autocast,
)
from d3etr_hf.models.group_attention import GroupAttention
from d3etr_hf.models.initialisation import start_at_prior
from d3etr_hf.outputs import DetectorOutput, GroupRequest, Queries


class D3etrConditionalDetrForObjectDetection(DenseMemoryDetector, ConditionalDetrForObjectDetection):
    """`ConditionalDetrForObjectDetection` with further query groups and attention maps on demand; see `Detector`."""

    stock_class = ConditionalDetrForObjectDetection
    title = "Conditional DETR"
    tag = "conditional-detr"
    anchor_size = 2
    makes_anchors = True
    citation = """@inproceedings{meng2021conditional,
  title={Conditional {DETR} for Fast Training Convergence},
  author={Meng, Depu and Chen, Xiaokang and Fan, Zejia and Zeng, Gang and Li, Houqiang and Yuan, Yuhui and Sun, Lei and
    Wang, Jingdong},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2021}
}"""

    eager_attention = staticmethod(eager_attention_forward)

    def static_queries(self) -> Queries:
        with torch.no_grad(), without_autocast(self.model.query_position_embeddings.weight):
            return self._own_queries()

    def _own_queries(self) -> Queries:
        position = self.model.query_position_embeddings.weight
        return Queries(position=position, anchors=self.model.decoder.ref_point_head(position).sigmoid())

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        memory = encode(self, pixel_values, pixel_mask)
        batch = len(memory.tokens)
        with without_autocast(memory.tokens):
            own = self._own_queries()
            queries = self.queries_of_groups(own, request)
            position = join((self.position_of(group) for group in queries.values()), batch)
            anchors = join((self._anchors(group) for group in queries.values()), batch)
        groups = start_groups(queries, request)
        hidden_states = self._decode(memory, position, anchors, groups)
        with without_autocast(memory.tokens):
            hidden_states = hidden_states.to(position.dtype)
            logits = self.class_labels_classifier(hidden_states)
            boxes = self.bbox_predictor(hidden_states)
            centre = boxes[..., :2] + inverse_sigmoid(anchors)
            boxes = torch.cat([centre, boxes[..., 2:]], dim=-1).sigmoid()
        return collect_groups((logits, boxes, hidden_states), groups, own, memory, request)

    def _anchors(self, queries: Queries) -> torch.Tensor:
        """Reference points, x and y in 0..1: handed over with the queries, or from the decoder's own head."""
        if queries.anchors is not None:
            return queries.anchors[..., :2]
        return self.model.decoder.ref_point_head(self.position_of(queries)).sigmoid()

    def _decode(
        self, memory: Memory, position: torch.Tensor, anchors: torch.Tensor, groups: GroupAttention
    ) -> torch.Tensor:
        """Run the decoder's own layers over all groups; see `normed_layers`."""
        decoder = self.model.decoder
        query_sine = encode_sinusoidal_position_embedding(anchors, num_pos_feats=self.width // 2)

        def run(index: int, hidden_states: torch.Tensor) -> torch.Tensor:
            scale = decoder.query_scale(hidden_states) if index else 1
            return decoder.layers[index](
                hidden_states,
                None,
                memory.position,
                position,
                query_sine * scale,
                memory.tokens,
                encoder_attention_mask=memory.attention_mask,
                is_first=index == 0,
                groups=groups,
            )

        return self.normed_layers(position, run)

    def criterion(self) -> DetectionCriterion:
        return focal_criterion(self.config)

    @torch.no_grad()
    def initialise(self, names: Iterable[str] | None = None) -> None:
        """As DETR, with the class bias at -log 99 and the last box layer zero."""
        chosen = set(dict(self.named_parameters()) if names is None else names)
        super().initialise(chosen)
        if self._is_new("class_labels_classifier", chosen):
            start_at_prior(self.class_labels_classifier)
        if self._is_new(self.box_layers[-1], chosen):
            nn.init.zeros_(self.bbox_predictor.layers[-1].weight)
            nn.init.zeros_(self.bbox_predictor.layers[-1].bias)

    def freeze(self) -> None:
        """As DETR; a single decoder layer's query scale, which no output depends on, does not train either."""
        super().freeze()
        if self.decoder_depth == 1:
            self.model.decoder.query_scale.requires_grad_(False)

    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        self._keep_outputs(index, names)

    def source_of(self, name: str, layer_map: list[int]) -> str:
        # only a first layer projects the queries' positions, so it comes from a first layer
        return name if ".encoder_attn.q_pos_proj." in name else super().source_of(name, layer_map)
