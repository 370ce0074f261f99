"""RF-DETR (Robinson et al., 2025)."""

from transformers import RfDetrForObjectDetection
from transformers.models.rf_detr.modeling_rf_detr import (
    RfDetrAttention,
    RfDetrDecoder,
    eager_attention_forward,
    refine_bboxes,
)

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.models.group_detr import GroupDetrAttention, GroupDetrDecoder, GroupDetrDetector


class GroupRfDetrAttention(GroupDetrAttention, RfDetrAttention):
    """RF-DETR's self-attention for groups of any size."""


class GroupRfDetrDecoder(GroupDetrDecoder, RfDetrDecoder):
    """RF-DETR's decoder for several groups."""


class D3etrRfDetrForObjectDetection(GroupDetrDetector, RfDetrForObjectDetection):
    """`RfDetrForObjectDetection` with further query groups and attention on demand; see `Detector`."""

    stock_class = RfDetrForObjectDetection
    title = "RF-DETR"
    tag = "rf-detr"
    citation = """@misc{robinson2025rfdetr,
  title={{RF-DETR}: Neural Architecture Search for Real-Time Detection Transformers},
  author={Robinson, Isaac and Robicheaux, Peter and Popov, Matvei and Ramanan, Deva and Peri, Neehar},
  year={2025},
  eprint={2511.09554},
  archivePrefix={arXiv}
}"""
    group_decoder = GroupRfDetrDecoder
    group_self_attention = GroupRfDetrAttention
    eager_attention = staticmethod(eager_attention_forward)
    refine = staticmethod(refine_bboxes)

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        if config.num_feature_levels != 1:
            raise ValueError(f"num_feature_levels is {config.num_feature_levels}, but the memory has one level: say 1")
        backbone = config.backbone_config
        if not backbone.reshape_hidden_states:
            raise ValueError("backbone_config: reshape_hidden_states is false, but the projector needs feature maps")
        if backbone.num_windows < 1:
            raise ValueError(f"backbone_config: num_windows is {backbone.num_windows}; it must be 1 or more")

    @property
    def side_divisor(self) -> int:
        return self.config.backbone_config.patch_size * self.config.backbone_config.num_windows

    @property
    def strides(self) -> list[float]:
        return [self.config.backbone_config.patch_size]

    def check_image(self, height: int, width: int) -> None:
        """Images must also be square, as the authors' are: Transformers mixes up the windows of others."""
        if height != width and self.config.backbone_config.num_windows > 1:
            raise ImageSizeError(
                f"an image of {width} x {height} pixels: RF-DETR's backbone takes squares only; resize images to a "
                f"square whose side is a multiple of {self.side_divisor}"
            )
        super().check_image(height, width)

    def freeze(self) -> None:
        """All train but what of the backbone no output depends on."""
        super().freeze()
        unread: tuple[str, ...] = ("embeddings.mask_token",)
        unread += () if self.config.backbone_config.apply_layernorm else ("layernorm.",)
        for name, parameter in self.backbone_module.named_parameters():
            if name.startswith(unread):
                parameter.requires_grad_(False)
