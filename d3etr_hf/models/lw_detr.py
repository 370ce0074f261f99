"""LW-DETR (Chen et al., 2024)."""

from transformers import LwDetrForObjectDetection
from transformers.models.lw_detr.modeling_lw_detr import (
    LwDetrAttention,
    LwDetrDecoder,
    eager_attention_forward,
    refine_bboxes,
)

from d3etr_hf.models.group_detr import GroupDetrAttention, GroupDetrDecoder, GroupDetrDetector


class GroupLwDetrAttention(GroupDetrAttention, LwDetrAttention):
    """LW-DETR's self-attention for groups of any size."""


class GroupLwDetrDecoder(GroupDetrDecoder, LwDetrDecoder):
    """LW-DETR's decoder for several groups."""


class D3etrLwDetrForObjectDetection(GroupDetrDetector, LwDetrForObjectDetection):
    """`LwDetrForObjectDetection` with further query groups and attention on demand; see `Detector`."""

    stock_class = LwDetrForObjectDetection
    title = "LW-DETR"
    tag = "lw-detr"
    citation = """@misc{chen2024lwdetr,
  title={{LW-DETR}: A Transformer Replacement to {YOLO} for Real-Time Detection},
  author={Chen, Qiang and Su, Xiangbo and Zhang, Xinyu and Wang, Jian and Chen, Jiahui and Shen, Yunpeng and
    Han, Chuchu and Chen, Ziliang and Xu, Weixiang and Li, Fanrong and Zhang, Shan and Yao, Kun and Ding, Errui and
    Zhang, Gang and Wang, Jingdong},
  year={2024},
  eprint={2406.03459},
  archivePrefix={arXiv}
}"""
    group_decoder = GroupLwDetrDecoder
    group_self_attention = GroupLwDetrAttention
    eager_attention = staticmethod(eager_attention_forward)
    refine = staticmethod(refine_bboxes)

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        if not config.projector_scale_factors:
            raise ValueError(
                "projector_scale_factors is empty: name a scale for each level of the memory, 2.0, 1.0 or 0.5"
            )
        if not config.backbone_config.use_absolute_position_embeddings:
            raise ValueError(
                "backbone_config: use_absolute_position_embeddings is false: Transformers cannot build such a model"
            )

    @property
    def side_divisor(self) -> int:
        return self.config.backbone_config.patch_size * self.config.backbone_config.num_windows_side

    @property
    def strides(self) -> list[float]:
        return [self.config.backbone_config.patch_size / scale for scale in self.config.projector_scale_factors]
