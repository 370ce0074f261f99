"""DEIMv2 (Huang et al., 2025)."""

from typing import Any

import torch
from torch import nn
from transformers import Deimv2ForObjectDetection
from transformers.models.deimv2.modeling_deimv2 import (
    Deimv2Decoder,
    Deimv2Gate,
    Deimv2LQE,
    Deimv2MultiscaleDeformableAttention,
    Deimv2SwiGLUFFN,
    eager_attention_forward,
)

from d3etr_hf.losses import DetectionCriterion
from d3etr_hf.models.d_fine import DistributionDecoder, DistributionDetector
from d3etr_hf.models.detector import BACKBONE, ENCODER

VISION_TRANSFORMER = "dinov3_vit"


class GroupDeimv2Decoder(DistributionDecoder, Deimv2Decoder):
    """DEIMv2's decoder for several groups."""


class D3etrDeimv2ForObjectDetection(DistributionDetector, Deimv2ForObjectDetection):
    """`Deimv2ForObjectDetection` with further query groups and attention on demand; see `Detector`.

    Trains as D-FINE, with another class loss; `use_dense_one_to_one` asks for the union of assignments. That is of all
    layers, where Transformers leaves the last but one out.
    """

    stock_class = Deimv2ForObjectDetection
    title = "DEIMv2"
    tag = "deimv2"
    citation = """@article{huang2025deimv2,
  title={Real-Time Object Detection Meets {DINOv3}},
  author={Huang, Shihua and Hou, Yongjie and Liu, Longfei and Yu, Xuanlong and Shen, Xi},
  journal={arXiv preprint arXiv:2509.20787},
  year={2025}
}"""
    parts = DistributionDetector.parts | {
        BACKBONE: ("model.conv_encoder.model.", "model.conv_encoder.backbone."),
        ENCODER: (
            "model.encoder.",
            "model.conv_encoder.encoder_input_proj.",
            "model.conv_encoder.spatial_tuning_adapter.",
            "model.conv_encoder.fusion_proj.",
        ),
    }
    group_decoder = GroupDeimv2Decoder
    eager_attention = staticmethod(eager_attention_forward)
    stock_starts = (
        Deimv2Decoder,
        Deimv2Gate,
        Deimv2LQE,
        Deimv2MultiscaleDeformableAttention,
        Deimv2SwiGLUFFN,
    )

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        if config.encoder_fuse_op != "sum":
            raise ValueError(f"encoder_fuse_op {config.encoder_fuse_op!r} must be 'sum': other maps have no block")

    @classmethod
    def levels_of(cls, config) -> int:
        return 2 if config.encoder_type == "lite" else super().levels_of(config)

    @property
    def backbone_module(self) -> nn.Module:
        encoder = self.model.conv_encoder
        return encoder.backbone if self.backbone_type == VISION_TRANSFORMER else encoder.model

    def criterion(self) -> DetectionCriterion:
        config = self.config
        return self._criterion(
            config.weight_loss_mal,
            config.use_dense_one_to_one,
            background_alpha=1.0 if config.mal_alpha is None else config.mal_alpha,
            target_exponent=config.focal_loss_gamma,
            weighs_overlap=False,
        )

    def saved_tensors(self, stock) -> dict[str, torch.Tensor] | None:
        """A box head that layers share, under all its names: from a single one Transformers does not load it again."""
        if not self.config.share_bbox_head:
            return None
        return {name: value.clone() for name, value in stock.state_dict().items()}

    def start_values(self) -> None:
        """As in D-FINE, but for the encoder's output."""
        super().start_values()
        self.model.enc_output[0].reset_parameters()

    def freeze(self) -> None:
        """What D-FINE freezes, and what of a vision transformer nothing is read from."""
        super().freeze()
        config: Any = self.config.backbone_config
        if config.model_type != VISION_TRANSFORMER:
            return
        layers = range(max(config.stage_names.index(name) for name in config.out_features), config.num_hidden_layers)
        unread = ("embeddings.mask_token", *(f"model.layer.{index}." for index in layers))
        unread += () if config.apply_layernorm else ("norm.",)
        for name, parameter in self.backbone_module.named_parameters():
            if name.startswith(unread):
                parameter.requires_grad_(False)
