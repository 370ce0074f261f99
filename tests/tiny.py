"""Small models and batches from configurations alone."""

import torch
from transformers import ConditionalDetrConfig, ConvNextConfig

from d3etr_hf.models import D3etrConditionalDetrForObjectDetection


def tiny_config(**changes) -> ConditionalDetrConfig:
    """A Conditional DETR of a few thousand parameters: stride 8, three decoder layers, three classes."""
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
    return ConditionalDetrConfig(**(options | changes))


def perturb(model: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """Move every weight away from its start value: many faults vanish at initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def tiny_model(seed: int = 0, **changes) -> D3etrConditionalDetrForObjectDetection:
    """A perturbed tiny detector in eval mode."""
    torch.manual_seed(seed)
    return perturb(D3etrConditionalDetrForObjectDetection(tiny_config(**changes))).eval()


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
