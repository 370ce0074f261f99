"""DETR (Carion et al., ECCV 2020)."""

from abc import abstractmethod

import torch
from transformers import DetrForObjectDetection
from transformers.models.detr.modeling_detr import eager_attention_forward

from d3etr_hf.losses import CrossEntropyCriterion, DetectionCriterion
from d3etr_hf.models.dense_memory import (
    DenseMemoryDetector,
    Memory,
    collect_groups,
    encode,
    join,
    start_groups,
    without_autocast,
)
from d3etr_hf.models.group_attention import GroupAttention
from d3etr_hf.outputs import DetectorOutput, GroupRequest, Queries


class PlainDetector(DenseMemoryDetector):
    """What DETR and Table Transformer share: queries are positions alone, scores a softmax with no object."""

    anchor_size = 0
    makes_anchors = False

    @abstractmethod
    def run_layer(
        self, index: int, hidden_states: torch.Tensor, position: torch.Tensor, memory: Memory, groups: GroupAttention
    ) -> torch.Tensor:
        """One decoder layer over the queries of all groups, `(B, sum of N, d)` each and in return."""

    def static_queries(self) -> Queries:
        return Queries(position=self.model.query_position_embeddings.weight)

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        memory = encode(self, pixel_values, pixel_mask)
        with without_autocast(memory.tokens):
            own = self.static_queries()
            queries = self.queries_of_groups(own, request)
        position = join((self.position_of(group) for group in queries.values()), len(memory.tokens))
        groups = start_groups(queries, request)
        hidden_states = self._decode(memory, position, groups)
        with without_autocast(memory.tokens):
            hidden_states = hidden_states.to(position.dtype)
            logits = self.class_labels_classifier(hidden_states)
            boxes = self.bbox_predictor(hidden_states).sigmoid()
        return collect_groups((logits, boxes, hidden_states), groups, own, memory, request)

    def _decode(self, memory: Memory, position: torch.Tensor, groups: GroupAttention) -> torch.Tensor:
        """Run the decoder's own layers over all groups; see `normed_layers`."""
        return self.normed_layers(position, lambda index, x: self.run_layer(index, x, position, memory, groups))

    def criterion(self) -> DetectionCriterion:
        config = self.config
        return CrossEntropyCriterion(
            class_cost=config.class_cost,
            l1_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            class_weight=1.0,
            l1_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            no_object_weight=config.eos_coefficient,
        )

    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        """Also keeps no object, last. What the head gave to other classes is shared out among those that stay."""
        no_object = torch.tensor([self.class_labels_classifier.out_features - 1], device=index.device)
        self._keep_outputs(torch.cat([index, no_object]), names)


class D3etrDetrForObjectDetection(PlainDetector, DetrForObjectDetection):
    """`DetrForObjectDetection` with further query groups and attention maps on demand; see `Detector`."""

    stock_class = DetrForObjectDetection
    title = "DETR"
    tag = "detr"
    citation = """@inproceedings{carion2020end,
  title={End-to-End Object Detection with Transformers},
  author={Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas and Kirillov, Alexander and
    Zagoruyko, Sergey},
  booktitle={European Conference on Computer Vision},
  year={2020}
}"""

    eager_attention = staticmethod(eager_attention_forward)

    def run_layer(
        self, index: int, hidden_states: torch.Tensor, position: torch.Tensor, memory: Memory, groups: GroupAttention
    ) -> torch.Tensor:
        return self.model.decoder.layers[index](
            hidden_states,
            None,
            memory.position,
            position,
            memory.tokens,
            encoder_attention_mask=memory.attention_mask,
            groups=groups,
        )
