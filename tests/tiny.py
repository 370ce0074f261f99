"""Small models and batches from configurations alone."""

from collections.abc import Callable

import torch
from transformers import (
    ConditionalDetrConfig,
    ConvNextConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    Deimv2Config,
    DetrConfig,
    DFineConfig,
    LwDetrConfig,
    LwDetrViTConfig,
    PreTrainedConfig,
    RfDetrConfig,
    RfDetrDinov2Config,
    RTDetrConfig,
    RTDetrV2Config,
    TableTransformerConfig,
)

from d3etr_hf.data.image_sizes import set_image_size, takes_fixed_size
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.outputs import GroupRequest, Queries, Targets
from d3etr_hf.outputs.targets import pack


def tiny_config(model_type: str = "conditional_detr", **changes) -> PreTrainedConfig:
    """A detector of a few thousand parameters: stride 8, three decoder layers, three classes."""
    return TINY_CONFIGS[model_type](**changes)


def _dense_options(**changes) -> dict:
    backbone = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_scale_init_value=1.0
    )
    options = {
        "backbone_config": backbone,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 7,
        "dropout": 0.0,
        "id2label": {0: "circle", 1: "rectangle", 2: "triangle"},
        "label2id": {"circle": 0, "rectangle": 1, "triangle": 2},
    }
    return options | changes


def _dab_options(**changes) -> dict:
    options = _dense_options()
    return options | {"hidden_size": options.pop("d_model")} | changes


def _hybrid_options(**changes) -> dict:
    """Of RT-DETR and its heirs: two levels, strides 4 and 8."""
    backbone = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        out_features=["stage1", "stage2"],
        layer_scale_init_value=1.0,
    )
    options = {
        "backbone_config": backbone,
        "d_model": 32,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 16],
        "feat_strides": [4, 8],
        "encode_proj_layers": [1],
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_in_channels": [32, 32],
        "num_feature_levels": 2,
        "decoder_ffn_dim": 48,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "num_queries": 7,
        "num_denoising": 10,
        "id2label": {0: "circle", 1: "rectangle", 2: "triangle"},
        "label2id": {"circle": 0, "rectangle": 1, "triangle": 2},
    }
    return options | changes


def _group_options(backbone: PreTrainedConfig, **changes) -> dict:
    """Of RF-DETR and LW-DETR: three groups of queries in training."""
    options = {
        "backbone_config": backbone,
        "d_model": 32,
        "c2f_num_blocks": 1,
        "decoder_layers": 3,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "decoder_n_points": 2,
        "decoder_ffn_dim": 48,
        "num_queries": 7,
        "group_detr": 3,
        "dropout": 0.0,
        "id2label": {0: "circle", 1: "rectangle", 2: "triangle"},
        "label2id": {"circle": 0, "rectangle": 1, "triangle": 2},
    }
    return options | changes


def _rf_options(**changes) -> dict:
    """Patches of 8 pixels in two by two windows; the backbone's last layer is not read."""
    backbone = RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=48,
        patch_size=8,
        num_windows=2,
        out_features=["stage2", "stage3"],
    )
    return _group_options(backbone, **changes)


def _lw_options(**changes) -> dict:
    """Patches of 8 pixels in two by two windows, two levels; the backbone's last layer is not read."""
    backbone = LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=64,
        pretrain_image_size=48,
        patch_size=8,
        num_windows=4,
        window_block_indices=[0, 2],
        out_features=["stage2", "stage3"],
    )
    return _group_options(backbone, **({"projector_scale_factors": [2.0, 1.0]} | changes))


def _deformable_options(**changes) -> dict:
    """Three levels of strides 4, 8 and 16, box refinement; `num_queries` counts proposals, too."""
    backbone = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        out_features=["stage1", "stage2"],
        layer_scale_init_value=1.0,
    )
    options = {"backbone_config": backbone, "num_feature_levels": 3, "with_box_refine": True}
    options = _dense_options(**(options | changes))
    return {"two_stage_num_proposals": options["num_queries"]} | options


# by model type; a new family adds a line here and is then held to the contract by tests/models/test_contract.py
TINY_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "conditional_detr": lambda **changes: ConditionalDetrConfig(**_dense_options(**changes)),
    "deformable_detr": lambda **changes: DeformableDetrConfig(**_deformable_options(**changes)),
    "dab-detr": lambda **changes: DabDetrConfig(**_dab_options(**changes)),
    "deimv2": lambda **changes: Deimv2Config(**_hybrid_options(**changes)),
    "detr": lambda **changes: DetrConfig(**_dense_options(**changes)),
    "d_fine": lambda **changes: DFineConfig(**_hybrid_options(**changes)),
    "lw_detr": lambda **changes: LwDetrConfig(**_lw_options(**changes)),
    "rf_detr": lambda **changes: RfDetrConfig(**_rf_options(**changes)),
    "rt_detr": lambda **changes: RTDetrConfig(**_hybrid_options(**changes)),
    "rt_detr_v2": lambda **changes: RTDetrV2Config(**({"decoder_n_levels": 2} | _hybrid_options(**changes))),
    "table-transformer": lambda **changes: TableTransformerConfig(**_dense_options(**changes)),
}


def perturb(model: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """Move every weight away from its start value: many faults vanish at initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def tiny_model(seed: int = 0, model_type: str = "conditional_detr", **changes) -> Detector:
    """A perturbed tiny detector in eval mode."""
    torch.manual_seed(seed)
    return perturb(FAMILIES[model_type](tiny_config(model_type, **changes))).eval()


def small_image_processor(model_type: str = "conditional_detr", short_side: int = 64, long_side: int = 64):
    """A new image processor of a family, for small images; of one that takes squares with the short side as theirs."""
    made = load_image_processor(None, model_type=model_type)
    size = {"short_side": short_side, "long_side": long_side}
    set_image_size(made, **({"image_size": short_side} if takes_fixed_size(made) else size))
    return made


def request_for(queries: dict[str, Queries | None] | None = None, maps: bool = False) -> GroupRequest:
    """A request for further groups, with all maps or none."""
    return GroupRequest(queries or {}, self_attention=maps, cross_attention=maps)


def random_queries(count: int = 5, width: int = 32, seed: int = 9, anchor_size: int = 0) -> Queries:
    """Position embeddings of no model, with anchors if asked for."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randn(count, width, generator=generator)
    anchors = torch.rand(count, anchor_size, generator=generator) if anchor_size else None
    return Queries(position=position, anchors=anchors)


def targets_of(labels: list[dict[str, torch.Tensor]]) -> Targets:
    """The ground truth as losses take it."""
    return Targets.from_packed(pack(labels), [len(label["class_labels"]) for label in labels])


def normalisers_of(criterion, objects: list[int], queries: int) -> dict[str, float]:
    """What a criterion divides by, for images of so many objects in one batch on one process."""
    counts = sum(objects), sum(min(count, queries) for count in objects), len(objects) * queries
    return {name: float(value) for name, value in criterion.normalisers(*map(torch.tensor, counts)).items()}


def padded_batch(batch: int = 2, size: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels; every image but the first is padded at the right and at the bottom."""
    generator = torch.Generator().manual_seed(seed)
    pixel_mask = torch.ones(batch, size, size, dtype=torch.int64)
    for image in range(1, batch):
        pixel_mask[image, size - 16 :] = 0
        pixel_mask[image, :, size - 8 * (image % 3 + 1) :] = 0
    pixel_values = torch.randn(batch, 3, size, size, generator=generator) * pixel_mask[:, None]
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def random_labels(counts: list[int], classes: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Per image `class_labels` int64 `(n,)`, `boxes` `(n, 4)` cxcywh in 0..1, `image_id`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.cat(
                [
                    torch.rand(count, 2, generator=generator) * 0.5 + 0.25,
                    torch.rand(count, 2, generator=generator) * 0.4 + 0.05,
                ],
                dim=1,
            ),
            "image_id": torch.tensor([100 + image]),
        }
        for image, count in enumerate(counts)
    ]
