"""RT-DETRv2 (Lv et al., 2024)."""

from typing import Any

from torch import nn
from transformers import RTDetrV2ForObjectDetection
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    RTDetrV2Decoder,
    RTDetrV2MultiscaleDeformableAttention,
    eager_attention_forward,
)

from d3etr_hf.models.detector import HEADS
from d3etr_hf.models.group_decoder import sampled_around
from d3etr_hf.models.rt_detr import ProposalDecoder, ProposalDetector, check_tied_heads
from d3etr_hf.outputs import SampledAttention


class GroupRTDetrV2Decoder(ProposalDecoder, RTDetrV2Decoder):
    """RT-DETRv2's decoder for several groups."""

    def sampling_modules(self) -> list[nn.Module]:
        return [layer.get_submodule("encoder_attn") for layer in self.layers]

    def sampled_by(self, module: Any, args: tuple, kwargs: dict[str, Any], output) -> SampledAttention:
        """The places are computed once more: the stock module keeps them to itself."""
        weights = output[1]
        offsets = module.sampling_offsets(kwargs["hidden_states"] + kwargs["position_embeddings"])
        scale = module.offset_scale * module.n_points_scale.to(offsets.dtype)[:, None]
        nearest = (module.n_points_list, kwargs["spatial_shapes_list"]) if module.method == "discrete" else None
        offsets = offsets.reshape(*weights.shape, 2) * scale
        return sampled_around(kwargs["reference_points"], offsets, weights, nearest)


class D3etrRTDetrV2ForObjectDetection(ProposalDetector, RTDetrV2ForObjectDetection):
    """`RTDetrV2ForObjectDetection` with further query groups and attention on demand; see `Detector`."""

    stock_class = RTDetrV2ForObjectDetection
    title = "RT-DETRv2"
    tag = "rt-detr-v2"
    citation = """@article{lv2024rtdetrv2,
  title={{RT-DETRv2}: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer},
  author={Lv, Wenyu and Zhao, Yian and Chang, Qinyao and Huang, Kui and Wang, Guanzhong and Liu, Yi},
  journal={arXiv preprint arXiv:2407.17140},
  year={2024}
}"""
    parts = ProposalDetector.parts | {HEADS: (*ProposalDetector.parts[HEADS], "class_embed.", "bbox_embed.")}
    group_decoder = GroupRTDetrV2Decoder
    eager_attention = staticmethod(eager_attention_forward)
    stock_starts = (RTDetrV2MultiscaleDeformableAttention,)
    class_outputs = ("class_embed.", *ProposalDetector.class_outputs)
    layer_modules = ("class_embed.", "bbox_embed.", *ProposalDetector.layer_modules)

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        check_tied_heads(config)
        if config.decoder_n_levels != config.num_feature_levels:
            raise ValueError(
                f"decoder_n_levels {config.decoder_n_levels} must be num_feature_levels, {config.num_feature_levels}"
            )

    def freeze(self) -> None:
        """What RT-DETR freezes, and places that are rounded."""
        super().freeze()
        if self.config.decoder_method == "discrete":
            for layer in self.model.decoder.layers:
                layer.encoder_attn.sampling_offsets.requires_grad_(False)
