"""Conditional DETR (Meng et al., ICCV 2021) that emits, per decoder layer and query group, what distillation reads."""

import copy

import torch
from torch import nn
from transformers import ConditionalDetrForObjectDetection
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrObjectDetectionOutput,
    encode_sinusoidal_position_embedding,
    inverse_sigmoid,
)
from transformers.utils import logging

from d3etr_hf.models.auxiliary_queries import AuxiliaryQueries
from d3etr_hf.models.group_attention import QUERY_GROUP_ATTENTION, AttentionRecorder
from d3etr_hf.models.initialisation import freeze_as_in_paper, initialise_as_in_paper
from d3etr_hf.models.outputs import DetectorOutput, QueryGroupOutput

logger = logging.get_logger(__name__)


class D3etrConditionalDetrForObjectDetection(ConditionalDetrForObjectDetection):
    """`ConditionalDetrForObjectDetection` with extra query groups and attention maps on demand.

    Loads any Conditional DETR checkpoint; computes what the stock class computes unless `return_groups` is set; saves
    a plain `ConditionalDetrForObjectDetection` checkpoint. A model built from a configuration starts as in the paper;
    built or loaded, what trains is what the paper trains. Checkpoints load in float32 unless `dtype` is given.
    """

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config):
        super().__init__(config)
        self.extra_query_groups = nn.ModuleList()
        for layer in self.model.decoder.layers:
            for attention in (layer.self_attn, layer.encoder_attn):
                attention.stock_config = config
                attention.config = copy.copy(config)
                # not through the property, which would set it in the backbone's shared configuration too
                attention.config._attn_implementation_internal = QUERY_GROUP_ATTENTION
        if self.device.type != "meta":
            initialise_as_in_paper(self)
            freeze_as_in_paper(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As in Transformers, in float32 by default; what the checkpoint lacks starts as in the paper."""
        kwargs.setdefault("dtype", torch.float32)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        new = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        if new:
            logger.warning(f"{len(new)} tensors are not in {pretrained_model_name_or_path} and start afresh: {new}")
            initialise_as_in_paper(model, new)
        freeze_as_in_paper(model)
        return (model, info) if output_loading_info else model

    def add_query_group(self, queries: AuxiliaryQueries) -> None:
        """Give the decoder one more query group while it trains; nothing of it is saved with the model."""
        self.extra_query_groups.append(queries.to(self.device))

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As in Transformers, but only non-reentrant: reentrant checkpointing would cut the maps off the gradient."""
        if (activation_checkpointing_kwargs or {}).get("use_reentrant", False):
            raise ValueError(
                "activation_checkpointing_kwargs: use_reentrant=True leaves attention maps without a gradient; "
                "use {'use_reentrant': False}"
            )
        chosen = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        super().activation_checkpointing_enable(chosen, **kwargs)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict] | None = None,
        return_groups: bool = False,
        return_self_attention: bool = False,
        return_cross_attention: bool = False,
        **kwargs,
    ) -> ConditionalDetrObjectDetectionOutput | DetectorOutput:
        """The stock forward pass, or one pass over every query group.

        Args:
            pixel_values: `(B, 3, height, width)` float, normalised.
            pixel_mask: `(B, height, width)`, 1 on the image, 0 on padding; none means no padding.
            labels, kwargs: for the stock forward pass only.
            return_groups: run all query groups and return a `DetectorOutput`.
            return_self_attention, return_cross_attention: with `return_groups`, materialise these maps.

        Returns:
            What `ConditionalDetrForObjectDetection` returns, or with `return_groups` a `DetectorOutput`.
        """
        if return_groups:
            recorder = AttentionRecorder(return_self_attention, return_cross_attention)
            return self._forward_groups(pixel_values, pixel_mask, recorder)
        return super().forward(pixel_values, pixel_mask=pixel_mask, labels=labels, **kwargs)

    def _forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, recorder: AttentionRecorder
    ) -> DetectorOutput:
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.int64)
        features, memory_mask = self.model.backbone(pixel_values, pixel_mask)[-1]
        memory_position = self.model.position_embedding(
            shape=features.shape, device=features.device, dtype=pixel_values.dtype, mask=memory_mask
        )
        memory_position = memory_position.flatten(2).transpose(1, 2)
        memory = self.model.encoder(
            inputs_embeds=self.model.input_projection(features).flatten(2).transpose(1, 2),
            attention_mask=memory_mask.flatten(1),
            spatial_position_embeddings=memory_position,
        ).last_hidden_state
        queries = [self.model.query_position_embeddings.weight, *(group() for group in self.extra_query_groups)]
        sizes = [len(group) for group in queries]
        query_position = torch.cat(queries).expand(len(memory), -1, -1)
        reference_points = self._reference_points(query_position, sizes)
        hidden_states = self._decode(
            memory, memory_mask, memory_position, query_position, reference_points, sizes, recorder
        )
        logits = self.class_labels_classifier(hidden_states)
        boxes = self.bbox_predictor(hidden_states)
        centre = boxes[..., :2] + inverse_sigmoid(reference_points)
        boxes = torch.cat([centre, boxes[..., 2:]], dim=-1).sigmoid()
        groups = zip(logits.split(sizes, dim=2), boxes.split(sizes, dim=2), strict=True)
        return DetectorOutput(
            groups=tuple(
                QueryGroupOutput(
                    logits=group_logits,
                    boxes=group_boxes,
                    self_attention=tuple(layer[i] for layer in recorder.self_maps) or None,
                    cross_attention=tuple(layer[i] for layer in recorder.cross_maps) or None,
                )
                for i, (group_logits, group_boxes) in enumerate(groups)
            ),
            memory_mask=memory_mask,
        )

    def _reference_points(self, query_position: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Centres `(B, sum of N, 2)` in 0..1: from the decoder's head, or those handed over with a group's queries."""
        points = self.model.decoder.ref_point_head(query_position).sigmoid()
        if all(group.reference_points is None for group in self.extra_query_groups):
            return points
        own, *extra = points.split(sizes, dim=1)
        given = [
            part if group.reference_points is None else group.reference_points.to(part.dtype).expand_as(part)
            for part, group in zip(extra, self.extra_query_groups, strict=True)
        ]
        return torch.cat([own, *given], dim=1)

    def _decode(
        self,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        memory_position: torch.Tensor,
        query_position: torch.Tensor,
        reference_points: torch.Tensor,
        sizes: list[int],
        recorder: AttentionRecorder,
    ) -> torch.Tensor:
        """Run the decoder's own layers over all groups; the normed hidden states of each layer `(L, B, sum of N, d)`.

        The original records norm(output) on the side. A configuration with `auxiliary_loss` means a checkpoint that
        was trained as Transformers computes it then: the norm feeds the next layer, and the last one is normed twice.
        """
        decoder, normed_between = self.model.decoder, self.config.auxiliary_loss
        attention_mask = create_bidirectional_mask(self._sdpa_config, query_position, memory_mask.flatten(1))
        query_sine = encode_sinusoidal_position_embedding(reference_points, num_pos_feats=self.config.d_model // 2)
        hidden_states, per_layer = torch.zeros_like(query_position), []
        for index, layer in enumerate(decoder.layers):
            scale = decoder.query_scale(hidden_states) if index else 1
            hidden_states = layer(
                hidden_states,
                None,
                memory_position,
                query_position,
                query_sine * scale,
                memory,
                encoder_attention_mask=attention_mask,
                is_first=index == 0,
                query_group_sizes=sizes,
                recorder=recorder,
            )
            per_layer.append(decoder.layernorm(hidden_states))
            if normed_between:
                hidden_states = per_layer[-1]
        if normed_between:
            per_layer[-1] = decoder.layernorm(hidden_states)
        recorder.open = False
        return torch.stack(per_layer)

    @property
    def _sdpa_config(self):
        """The configuration that asks for boolean masks, whatever implementation the encoder runs on."""
        config = copy.copy(self.config)
        config._attn_implementation_internal = "sdpa"  # the property would set the backbone's as well
        return config

    def to_stock(self) -> ConditionalDetrForObjectDetection:
        """The same detector as a plain Transformers model sharing this one's tensors, without extra query groups."""
        return self._stock_model(self.state_dict())

    def _stock_model(self, state_dict: dict[str, torch.Tensor]) -> ConditionalDetrForObjectDetection:
        own = {name: value for name, value in state_dict.items() if not name.startswith("extra_query_groups.")}
        config = type(self.config).from_dict(self.config.to_dict())  # a copy that asks for no attention implementation
        with torch.device("meta"):
            stock = ConditionalDetrForObjectDetection(config)
        stock.load_state_dict(own, strict=True, assign=True)
        for name, buffer in self.named_buffers():  # those that no state dict holds, such as a Swin's index tables
            if name not in own and not name.startswith("extra_query_groups."):
                module, _, leaf = name.rpartition(".")
                setattr(stock.get_submodule(module), leaf, buffer)
        return stock.eval()

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        """Write a plain `ConditionalDetrForObjectDetection` checkpoint: no extra query group, no code of ours."""
        stock = self._stock_model(self.state_dict() if state_dict is None else state_dict)
        stock.save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
