"""Checkpoints over timm's ResNets are loaded without timm; the features are those of one from the paper."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, ConditionalDetrConfig

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import ModelArguments, build_model, load_detector
from d3etr_hf.models.timm_names import refuse_missing_timm
from d3etr_hf.outputs import OWN, GroupRequest
from tests.tiny import tiny_config, tiny_model

# as microsoft/conditional-detr-resnet-50 has them, field by field; its transformer made small
CONDITIONAL_DETR = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["ConditionalDETRForObjectDetection"],
    "attention_dropout": 0.0,
    "auxiliary_loss": False,
    "backbone": "resnet50",
    "bbox_cost": 5,
    "bbox_loss_coefficient": 5,
    "class_cost": 2,
    "cls_loss_coefficient": 2,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "dice_loss_coefficient": 1,
    "dilation": False,
    "dropout": 0.1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 1,
    "focal_alpha": 0.25,
    "giou_cost": 2,
    "giou_loss_coefficient": 2,
    "id2label": {"0": "circle", "1": "rectangle", "2": "triangle"},
    "init_std": 0.02,
    "init_xavier_std": 1.0,
    "is_encoder_decoder": True,
    "label2id": {"circle": 0, "rectangle": 1, "triangle": 2},
    "mask_loss_coefficient": 1,
    "max_position_embeddings": 1024,
    "model_type": "conditional_detr",
    "num_channels": 3,
    "num_hidden_layers": 1,
    "num_queries": 7,
    "position_embedding_type": "sine",
    "scale_embedding": False,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "use_pretrained_backbone": True,
    "use_timm_backbone": True,
}
# what facebook/detr-resnet-50 says otherwise
DETR = {
    **{name: value for name, value in CONDITIONAL_DETR.items() if name not in ("cls_loss_coefficient", "focal_alpha")},
    "architectures": ["DetrForObjectDetection"],
    "class_cost": 1,
    "classifier_dropout": 0.0,
    "eos_coefficient": 0.1,
    "model_type": "detr",
}
KWARGS = {"in_chans": 3, "out_indices": [1, 2, 3, 4]}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def timm_weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights and batch norm statistics by timm's names, which are torchvision's."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def convolution(place: str, outputs: int, inputs: int, size: int) -> None:
        gain = (2 / (inputs * size**2)) ** 0.5
        weights[f"{place}.weight"] = gain * torch.randn(outputs, inputs, size, size, generator=generator)

    def norm(place: str, channels: int) -> None:
        for leaf, spread, middle in (("weight", 0.2, 0.7), ("bias", 0.1, 0), ("running_mean", 0.1, 0)):
            weights[f"{place}.{leaf}"] = middle + spread * torch.randn(channels, generator=generator)
        weights[f"{place}.running_var"] = torch.rand(channels, generator=generator) + 0.5

    convolution("conv1", 64, 3, 7)
    norm("bn1", 64)
    inputs, bottleneck = 64, name not in ("resnet18", "resnet34")
    for stage, blocks in enumerate(DEPTHS[name]):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(blocks):
            place = f"layer{stage + 1}.{block}"
            for number, (channels, size) in enumerate(
                [(width, 1), (width, 3), (outputs, 1)] if bottleneck else [(width, 3), (outputs, 3)]
            ):
                before = inputs if number == 0 else width
                convolution(f"{place}.conv{number + 1}", channels, before, size)
                norm(f"{place}.bn{number + 1}", channels)
            if block == 0 and (stage > 0 or bottleneck):
                convolution(f"{place}.downsample.0", outputs, inputs, 1)
                norm(f"{place}.downsample.1", outputs)
            inputs = outputs
    return weights


def slow_resnet(weights: dict[str, Tensor], pixels: Tensor, name: str, dilated: bool = False) -> list[Tensor]:
    """Features of the four stages, from the paper (He et al., 2016), and torchvision's dilation."""

    def convolve(x: Tensor, place: str, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = weights[f"{place}.weight"]
        padding = dilation * (kernel.shape[-1] // 2)
        return nn.functional.conv2d(x, kernel, None, stride, padding, dilation)

    def norm(x: Tensor, place: str) -> Tensor:
        mean, variance, weight, bias = (
            weights[f"{place}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    x = norm(convolve(pixels, "conv1", 2), "bn1").relu()
    x = nn.functional.max_pool2d(x, 3, 2, 1)
    features = []
    for stage, blocks in enumerate(DEPTHS[name], 1):
        for block in range(blocks):
            place = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            before = after = 1
            if dilated and stage == 4:
                stride, before, after = 1, 1 if block == 0 else 2, 2
            shortcut = x
            if f"{place}.downsample.0.weight" in weights:
                shortcut = norm(convolve(x, f"{place}.downsample.0", stride), f"{place}.downsample.1")
            if f"{place}.conv3.weight" in weights:
                x = norm(convolve(x, f"{place}.conv1"), f"{place}.bn1").relu()
                x = norm(convolve(x, f"{place}.conv2", stride, before), f"{place}.bn2").relu()
                x = norm(convolve(x, f"{place}.conv3"), f"{place}.bn3")
            else:
                x = norm(convolve(x, f"{place}.conv1", stride, before), f"{place}.bn1").relu()
                x = norm(convolve(x, f"{place}.conv2", 1, after), f"{place}.bn2")
            x = (x + shortcut).relu()
        features.append(x)
    return features


def rest_of(fields: dict, channels: int, folder: Path) -> dict[str, Tensor]:
    """The tensors of a detector outside of its backbone, by the names in which checkpoints hold them."""
    sizes = {name: fields[name] for name in ("d_model", "decoder_layers", "encoder_layers", "num_queries")}
    model = tiny_model(model_type=fields["model_type"], **sizes)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.input_projection.weight"] = 0.05 * torch.randn(fields["d_model"], channels, 1, 1)
    return {name: value for name, value in weights.items() if ".conv_encoder." not in name}


def write_checkpoint(
    folder: Path, fields: dict, prefix: str = "model.backbone.conv_encoder.model."
) -> dict[str, Tensor]:
    """A folder as public checkpoints look; the backbone's weights by timm's names."""
    name = (fields["backbone"] or fields["backbone_config"]["backbone"]).split(".")[0]
    backbone = timm_weights(name)
    channels = 512 if name in ("resnet18", "resnet34") else 2048
    weights = rest_of(fields, channels, folder / "rest") | {f"{prefix}{key}": value for key, value in backbone.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    return backbone


def pixels_of(height: int = 70, width: int = 101) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))


def close(features: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(features, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


LAYOUTS = {
    "as of microsoft": CONDITIONAL_DETR,
    "as of facebook": DETR,
    "with null": DETR | {"backbone_config": None, "backbone_kwargs": None},
    # as fine-tuned with Transformers 4.4x; with these beside it Transformers 5 looks on the Hub for a "resnet18"
    "with backbone_kwargs": DETR | {"backbone_config": None, "backbone_kwargs": KWARGS},
    "backbone_config": CONDITIONAL_DETR
    | {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [2, -1]}},
    "tagged": DETR | {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18.a1_in1k"}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_a_resnet_written_from_the_paper(tmp_path, layout, monkeypatch):
    """Guards a tensor under the name of another of its shape, which no loading report would show."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    fields = LAYOUTS[layout] | {"backbone": None if "backbone_config" in layout or layout == "tagged" else "resnet18"}
    weights = write_checkpoint(tmp_path, fields)
    model = load_detector(str(tmp_path), "teacher")
    assert model.backbone_type == "resnet" and model.unsaveable is None
    expected = slow_resnet(weights, pixels_of(), "resnet18")
    with torch.no_grad():
        close(model.backbone_module(pixels_of()).feature_maps[-1], expected[-1])
        (features, _) = model.model.backbone(pixels_of(), torch.ones(1, 70, 101))[0]
    close(features, expected[{"backbone_config": 1, "tagged": 3}.get(layout, 0)])
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("embedder" in name or "stages.0" in name for name in trains)
    assert any("stages.1" in name for name in trains)


@pytest.mark.parametrize("prefix", ["model.backbone.model.", "model.backbone.conv_encoder.model._backbone."])
def test_other_places_of_the_backbone(tmp_path, prefix):
    """Of newer versions of Transformers, and of families that keep the wrapper."""
    weights = write_checkpoint(tmp_path, DETR | {"backbone": "resnet18"}, prefix)
    with torch.no_grad():
        features = load_detector(str(tmp_path)).backbone_module(pixels_of()).feature_maps[-1]
    close(features, slow_resnet(weights, pixels_of(), "resnet18")[-1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dilated_resnet_teaches_and_is_neither_trained_nor_saved(tmp_path, name):
    fields = (DETR if name == "resnet18" else CONDITIONAL_DETR) | {"backbone": name, "dilation": True}
    expected = slow_resnet(write_checkpoint(tmp_path, fields), pixels_of(), name, dilated=True)
    model = load_detector(str(tmp_path), "teacher")
    with torch.no_grad():
        features = model.backbone_module(pixels_of()).feature_maps[-1]
        own, stock = model(pixels_of()), model.to_stock()(pixels_of())
    assert features.shape[-2:] == expected[2].shape[-2:]
    close(features, expected[-1])
    assert model(pixels_of(), request=GroupRequest()).memory_mask.shape[1:] == expected[-1].shape[-2:]
    assert torch.equal(own.logits, stock.logits)  # what benchmarks and exports read
    with pytest.raises(DetectorLoadError, match="cannot be saved.*DC5"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(DetectorLoadError, match=f"model '{tmp_path}' cannot be trained: .*DC5"):
        build_model(ModelArguments(model=str(tmp_path)), ["circle", "rectangle", "triangle"])


def test_saved_again_it_is_native(tmp_path):
    """Stock Transformers loads it without timm, and computes the same."""
    write_checkpoint(tmp_path, CONDITIONAL_DETR | {"backbone": "resnet18"})
    model = load_detector(str(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["backbone_config"]["model_type"] == "resnet"
    stock = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved").eval()
    again = load_detector(str(tmp_path / "saved"))
    with torch.no_grad():
        logits = model(pixels_of(), request=GroupRequest()).groups[OWN].logits[-1]
        torch.testing.assert_close(stock(pixels_of()).logits, logits)
        torch.testing.assert_close(again(pixels_of()).logits, logits)


def test_missing_tensor_is_named(tmp_path):
    write_checkpoint(tmp_path, DETR | {"backbone": "resnet18"})
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.backbone.conv_encoder.model.layer3.1.bn2.running_var"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DetectorLoadError, match=r"1 tensors are missing.*stages\.2\.layers\.1\.layer\.1\.norm"):
        load_detector(str(tmp_path))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"backbone": "resnet50d"}, r"'resnet50d': .*another stem, block or shortcut"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "'swin_tiny.*can be a resnet18, resnet34"),
        ({"backbone_kwargs": {"output_stride": 8}}, "output_stride is 8, and only the last stage"),
        ({"backbone_kwargs": {"out_indices": [0, 4]}}, "name the stem"),
        ({"backbone_kwargs": {**KWARGS, "block_args": {}}}, r"the options \['block_args'\]"),
    ],
)
def test_other_timm_backbones_need_timm(tmp_path, changes, reason, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    (tmp_path / "config.json").write_text(json.dumps(DETR | changes))
    with pytest.raises(DetectorLoadError, match=rf"timm backbone .*{reason}.*pip install timm"):
        load_detector(str(tmp_path), "teacher")


def test_a_single_scale_detector_takes_the_last_stage_whatever_is_written(tmp_path):
    """As SenseTime/deformable-detr-single-scale has its fields: its convolution encoder never read `out_indices`."""
    backbone = {"backbone_config": None, "backbone": "resnet18", "use_timm_backbone": True}
    options = {"num_feature_levels": 1, "with_box_refine": False, "num_queries": 7}
    whole = {"backbone_config": tiny_config().backbone_config}
    tiny_model(model_type="deformable_detr", **options, **whole).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(fields | backbone | {"backbone_kwargs": {"in_chans": 3, "out_indices": [2, 3, 4]}})
    )
    rest, weights = load_file(tmp_path / "model.safetensors"), timm_weights("resnet18")
    kept = {name: value for name, value in rest.items() if ".backbone." not in name}
    kept["model.input_proj.0.0.weight"] = 0.05 * torch.randn(32, 512, 1, 1)
    renamed = {f"model.backbone.conv_encoder.model.{name}": value for name, value in weights.items()}
    save_file(kept | renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        levels = load_detector(str(tmp_path)).backbone_module(pixels_of()).feature_maps
    assert len(levels) == 1
    close(levels[0], slow_resnet(weights, pixels_of(), "resnet18")[-1])


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("dilated", [False, True])
def test_against_stock_transformers_with_timm(tmp_path, name, dilated):
    write_checkpoint(tmp_path, DETR | {"backbone": name, "dilation": dilated})
    stock = AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert stock.config.backbone_config.model_type == "timm_backbone"
    model = load_detector(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels_of()).logits, stock(pixels_of()).logits)
        torch.testing.assert_close(model(pixels_of()).pred_boxes, stock(pixels_of()).pred_boxes)


def test_timm_beside_a_broken_torchvision_is_told(tmp_path, monkeypatch):
    """timm imports torchvision, which raises where it is of another build than torch's."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    config = ConditionalDetrConfig(backbone_config={"model_type": "timm_backbone", "backbone": "resnet50d"})
    with pytest.raises(DetectorLoadError, match="timm cannot be imported .*nms does not exist.*torchvision of"):
        refuse_missing_timm(config, "teacher")
