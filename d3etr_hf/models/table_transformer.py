"""Table Transformer (Smock et al., CVPR 2022): DETR with norms before attention."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TableTransformerForObjectDetection
from transformers.models.table_transformer.modeling_table_transformer import TableTransformerAttention

from d3etr_hf.models.dense_memory import Memory
from d3etr_hf.models.detr import PlainDetector
from d3etr_hf.models.group_attention import GroupAttention
from d3etr_hf.models.own_attention import OwnAttention, OwnAttentionDetector


class GroupTableTransformerAttention(OwnAttention, TableTransformerAttention):
    """DETR's attention, projections included; positions are added to queries and keys."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        object_queries=None,
        key_value_states=None,
        spatial_position_embeddings=None,
        output_attentions=False,
    ):
        if self.groups is None:
            return super().forward(
                hidden_states,
                attention_mask,
                object_queries,
                key_value_states,
                spatial_position_embeddings,
                output_attentions,
            )
        placed = hidden_states + object_queries
        keys, values = placed, hidden_states
        if not self.is_self_attention:
            keys, values = key_value_states + spatial_position_embeddings, key_value_states
        query, key, value = self.q_proj(placed), self.k_proj(keys), self.v_proj(values)
        return self.out_proj(self.attend_apart(query, key, value, attention_mask, self.num_heads, self.dropout)), None


class D3etrTableTransformerForObjectDetection(OwnAttentionDetector, PlainDetector, TableTransformerForObjectDetection):
    """`TableTransformerForObjectDetection` with further query groups and attention maps on demand; see `Detector`."""

    stock_class = TableTransformerForObjectDetection
    title = "Table Transformer"
    tag = "table-transformer"
    citation = """@inproceedings{smock2022pubtables,
  title={{PubTables-1M}: Towards Comprehensive Table Extraction from Unstructured Documents},
  author={Smock, Brandon and Pesala, Rohith and Abraham, Robin},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}"""
    group_attention = GroupTableTransformerAttention

    def attention_modules(self) -> Iterator[tuple[Any, bool]]:
        for layer in self.model.decoder.layers:
            yield layer.self_attn, True
            yield layer.encoder_attn, False

    def _decode(self, memory: Memory, position: torch.Tensor, groups: GroupAttention) -> torch.Tensor:
        with self.attending(groups):
            return super()._decode(memory, position, groups)

    def run_layer(
        self, index: int, hidden_states: torch.Tensor, position: torch.Tensor, memory: Memory, groups: GroupAttention
    ) -> torch.Tensor:
        mask = memory.attention_mask
        layer = self.model.decoder.layers[index]
        return layer(hidden_states, None, memory.position, position, memory.tokens, encoder_attention_mask=mask)[0]
