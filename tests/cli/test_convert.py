"""`d3etr convert`: published checkpoints, made here by the authors' names, and files that would run code."""

import argparse
import json
import os
import pickle
import re
import sys
from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForObjectDetection, ConditionalDetrConfig, DetrConfig, ResNetConfig

from d3etr_hf.cli import convert
from d3etr_hf.errors import CommandLineError, DetectorLoadError, OutputFolderError, WriteError
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import FAMILIES, load_detector
from tests.tiny import perturb, tiny_model

TINY = {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]}
OF_RESNET18 = {
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}
PIXELS = torch.randn(1, 3, 75, 90, generator=torch.Generator().manual_seed(4))
OPTIONS = {"nheads": 4, "dilation": False, "dropout": 0.2, "pre_norm": False, "backbone": "resnet50", "lr": 1e-4}


def detector(model_type="conditional_detr", classes=91, backbone=TINY):
    """A trained model of few parameters over a four-stage ResNet."""
    torch.manual_seed(0)
    config_class = {"conditional_detr": ConditionalDetrConfig, "detr": DetrConfig}[model_type]
    names = [f"class {index}" for index in range(classes)]
    config = config_class(
        backbone_config=ResNetConfig(**backbone, out_features=["stage4"]),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        num_queries=7,
        dropout=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = perturb(FAMILIES[model_type](config), 0.05).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape) + 0.5)
        elif name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape))
    return model


def authors_name(name: str) -> str:
    """Transformers' name of a tensor back to that of the authors' code, by the modules of their `models/`."""
    name = name.removeprefix("model.")
    if name.startswith("backbone."):
        name = name.replace("backbone.model.", "backbone.0.body.").replace("embedder.embedder.convolution", "conv1")
        name = name.replace("embedder.embedder.normalization", "bn1")
        match = re.fullmatch(r"(.*)encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name)
        if match is None:
            return name
        start, stage, block, rest = match.groups()
        for number in (0, 1, 2):
            rest = rest.replace(f"layer.{number}.convolution", f"conv{number + 1}")
            rest = rest.replace(f"layer.{number}.normalization", f"bn{number + 1}")
        rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        return f"{start}layer{int(stage) + 1}.{block}.{rest}"
    heads = {
        "input_projection": "input_proj",
        "query_position_embeddings": "query_embed",
        "class_labels_classifier": "class_embed",
        "bbox_predictor": "bbox_embed",
    }
    module, _, rest = name.partition(".")
    if module in heads:
        return f"{heads[module]}.{rest}"
    if rest.startswith("layernorm."):
        return f"transformer.decoder.norm.{rest.removeprefix('layernorm.')}"
    norms = ["self_attn_layer_norm", *(["encoder_attn_layer_norm"] if module == "decoder" else []), "final_layer_norm"]
    for number, norm in enumerate(norms, 1):
        rest = rest.replace(f".{norm}.", f".norm{number}.")
    return f"transformer.{module}.{rest.replace('.mlp.fc', '.linear')}"


def authors_tensors(model) -> dict[str, torch.Tensor]:
    tensors = {authors_name(name): value for name, value in model.state_dict().items()}
    if "detr" in model.config.model_type and "conditional" in model.config.model_type:
        short = {"content_proj": "content_proj", "pos_proj": "pos_proj", "pos_sine_proj": "pos_sine_proj"}
        for name in [name for name in tensors if ".decoder.layers." in name]:
            new = name.replace(".self_attn.v_proj", ".sa_v_proj").replace(".encoder_attn.v_proj", ".ca_v_proj")
            for letter in "qk":
                for kind in short:
                    new = new.replace(f".self_attn.{letter}_{kind}", f".sa_{letter}{kind}")
                    new = new.replace(f".encoder_attn.{letter}_{kind}", f".ca_{letter}{kind}")
            new = new.replace("self_attn.o_proj", "self_attn.out_proj").replace(
                "encoder_attn.o_proj", "cross_attn.out_proj"
            )
            tensors[new] = tensors.pop(name)
    tensors = {name.replace("encoder_attn", "multihead_attn"): value for name, value in tensors.items()}
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        tensors[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return {name.replace(".o_proj.", ".out_proj."): value for name, value in tensors.items()}


def write(path, tensors, **options) -> str:
    """As the authors' `main.py` saves."""
    args = argparse.Namespace(**OPTIONS | options)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    torch.save({"model": tensors, "optimizer": optimizer, "lr_scheduler": {}, "epoch": 49, "args": args}, path)
    return str(path)


@pytest.mark.parametrize("model_type", ["conditional_detr", "detr"])
def test_converted_checkpoint_computes_the_same(tmp_path, model_type, monkeypatch, capsys):
    """And stock Transformers loads it; guards two tensors of one shape that take each other's place."""
    model = detector(model_type)
    tensors = authors_tensors(model)
    assert {"conditional_detr": "transformer.decoder.layers.1.ca_qpos_sine_proj.bias"}.get(
        model_type, "transformer.decoder.layers.1.multihead_attn.in_proj_bias"
    ) in tensors and "transformer.encoder.layers.0.self_attn.in_proj_weight" in tensors
    path, folder = write(tmp_path / "official.pth", tensors), tmp_path / "converted"
    monkeypatch.setattr(sys, "argv", ["d3etr convert", path, str(folder)])
    convert.main()
    assert f"{folder}: {model.title}, " in capsys.readouterr().out
    loaded, stock = load_detector(str(folder)), AutoModelForObjectDetection.from_pretrained(folder).eval()
    assert loaded.class_names[1] == "person" and loaded.class_names[90] == "toothbrush"
    assert loaded.config.dropout == 0.2 != type(loaded.config)().dropout  # on which training goes on
    assert not loaded.config.auxiliary_loss  # the authors' code feeds the next layer what is not normed
    assert load_image_processor(str(folder)).size["longest_edge"] == 1333
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        for each in (loaded, stock):
            torch.testing.assert_close(each(PIXELS).logits, model(PIXELS).logits)
            torch.testing.assert_close(each(PIXELS).pred_boxes, model(PIXELS).pred_boxes)


def test_dilated_backbone_stays_dilated(tmp_path):
    """By the file's options, or by the flag where it has none; a teacher, which is not saved."""
    model = detector(backbone=OF_RESNET18, classes=2)
    tensors, names = authors_tensors(model), tmp_path / "names.txt"
    names.write_text("cell\nplatelet\n")
    torch.save({"model": tensors}, tmp_path / "bare.pth")
    with pytest.raises(DetectorLoadError, match="does not say whether its backbone is dilated.*--dilated"):
        convert.convert_checkpoint(str(tmp_path / "bare.pth"), str(tmp_path / "bare"), str(names))
    said = convert.convert_checkpoint(
        write(tmp_path / "dc5.pth", tensors, dilation=True), str(tmp_path / "dc5"), str(names)
    )
    assert "2 classes; the last stage of its backbone is dilated (DC5)" in said
    assert json.loads((tmp_path / "dc5/config.json").read_text())["backbone_config"]["output_stride"] == 16
    loaded = load_detector(str(tmp_path / "dc5"))
    assert loaded.class_names == ["cell", "platelet"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        sizes = [each.backbone_module(PIXELS).feature_maps[-1].shape[-2:] for each in (loaded, model)]
    assert sizes == [(5, 6), (3, 3)]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["code", "another global", "plain pickle", "damaged", "no file", "other content"])
def test_only_tensors_and_options_are_let_in(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, message = tmp_path / "official.pth", "is no PyTorch file that can be read safely"
    if kind == "code":
        torch.save({"model": {}, "args": Hostile()}, path)
        message += f": it asks for {os.mkdir.__module__}.mkdir, and nothing but tensors"
    elif kind == "another global":
        torch.save({"model": {}, "args": Fraction(1, 2)}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"model": Hostile()}))
    elif kind == "damaged":
        path.write_bytes(b"PK\x03\x04 not a zip file")
    elif kind == "no file":
        message = "there is no such file"
    else:
        torch.save({"state_dict": {}}, path)
        message = "holds no tensors by name, neither .* nor under 'model', as the authors' checkpoints do"
    with pytest.raises(DetectorLoadError, match=f"official.pth.*{message}"):
        convert.convert_checkpoint("official.pth", "converted")
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "converted").exists()


def test_what_does_not_fit_is_named(tmp_path):
    tensors = authors_tensors(detector(classes=3))

    def refused(match, changed, classes="coco", **options):
        folder = tmp_path / "converted"
        with pytest.raises((DetectorLoadError, CommandLineError), match=f"(?s){match}"):
            convert.convert_checkpoint(write(tmp_path / "a.pth", changed, **options), str(folder), str(classes))
        assert not folder.exists()

    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    refused("has 3 classes, and 91 names are given: --classes", tensors)
    refused("cannot be read.*coco, or a file of names", tensors, tmp_path / "absent.txt")
    refused("trained with pre_norm", tensors, names, pre_norm=True)
    without = {name: value for name, value in tensors.items() if name != "bbox_embed.layers.1.bias"}
    refused(r"1 are missing \['bbox_predictor\.layers\.1\.bias'\], 0 are none of its own", without, names)
    refused(r"lacks the tensor query_embed", {k: v for k, v in tensors.items() if "query_embed" not in k}, names)
    refused(r"1 are none of its own \['mask_head", tensors | {"mask_head.lay1.weight": torch.ones(2)}, names)
    refused("1 have another shape .*input_proj", tensors | {"input_proj.bias": torch.ones(2)}, names)
    refused("is none of resnet18", tensors, names, dilation=True)
    refused("neither of a Conditional DETR nor of a DETR", {"a": torch.ones(1)}, names)


def test_a_pickle_of_transformers_becomes_safetensors(tmp_path):
    """Beside its config.json, which says all but the tensors; image processor included."""
    old, new, model = tmp_path / "old", tmp_path / "new", tiny_model(model_type="deformable_detr")
    model.save_pretrained(old)
    load_image_processor(None, 480, 640).save_pretrained(old)
    torch.save(model.to_stock().state_dict(), old / "pytorch_model.bin")  # with tied heads as one tensor of two names
    (old / "model.safetensors").unlink()
    with pytest.raises(DetectorLoadError, match=f"are a pickle .*d3etr convert {old / 'pytorch_model.bin'} "):
        load_detector(str(old))
    assert "3 classes" in convert.convert_checkpoint(str(old / "pytorch_model.bin"), str(new))
    torch.testing.assert_close(load_detector(str(new)).state_dict(), model.state_dict(), atol=0, rtol=0)
    assert load_image_processor(str(new)).size["longest_edge"] == 640


@pytest.mark.parametrize("content", [{"a": Hostile()}, {"model": {}}, [torch.ones(1)], {}])
def test_a_pickle_of_transformers_runs_no_code(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save(content, "pytorch_model.bin")
    with pytest.raises(DetectorLoadError, match="pytorch_model.bin (is no PyTorch file that can|holds no tensors)"):
        convert.convert_checkpoint("pytorch_model.bin", "converted")
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "converted").exists()


def test_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(OutputFolderError, match="is not empty"):
        convert.convert_checkpoint("official.pth", str(tmp_path))


def test_an_authors_file_in_a_models_folder_is_one_of_the_authors(tmp_path):
    """Whatever lies beside it: what the file holds decides."""
    model, names = detector(classes=2), tmp_path / "names.txt"
    names.write_text("cell\nplatelet\n")
    tiny_model().save_pretrained(tmp_path / "other")
    path = write(tmp_path / "other/official.pth", authors_tensors(model))
    assert "2 classes" in convert.convert_checkpoint(path, str(tmp_path / "new"), str(names))
    torch.testing.assert_close(load_detector(str(tmp_path / "new")).state_dict(), model.state_dict(), atol=0, rtol=0)


def test_a_stock_pickle_without_its_configuration_is_named(tmp_path):
    torch.save(tiny_model().to_stock().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DetectorLoadError, match=r"pytorch_model.bin .*put the config.json .* beside it"):
        convert.convert_checkpoint(str(tmp_path / "pytorch_model.bin"), str(tmp_path / "new"))


@pytest.fixture
def old(tmp_path):
    """A folder of Transformers' with a pickle."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "old")
    torch.save(model.to_stock().state_dict(), tmp_path / "old/pytorch_model.bin")
    return tmp_path / "old/pytorch_model.bin"


def test_one_part_of_several_is_refused(tmp_path, old):
    """It would make a checkpoint that lacks half of its tensors."""
    part = old.rename(old.with_name("pytorch_model-00001-of-00002.bin"))
    with pytest.raises(DetectorLoadError, match=f"{part} is one of several parts of a checkpoint"):
        convert.convert_checkpoint(str(part), str(tmp_path / "new"))


@pytest.mark.parametrize("made", [False, True])
def test_what_cannot_be_loaded_leaves_no_folder(tmp_path, old, made):
    """So that the next try, with the file that was mended, finds the place as it was."""
    new, config = tmp_path / "deep/new", old.with_name("config.json")
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"decoder_layers": 2}))
    if made:
        new.mkdir(parents=True)
    with pytest.raises(DetectorLoadError, match=rf"^{old} became no detector: model '{new}': .* another architecture"):
        convert.convert_checkpoint(str(old), str(new))
    assert [*new.parent.iterdir()] == [new] * made
    config.write_text(whole)
    assert "3 classes" in convert.convert_checkpoint(str(old), str(new))
    assert load_detector(str(new)) and [*new.parent.iterdir()] == [new]


@pytest.mark.parametrize("place", ["d3etr_hf.models.pickled_weights.save_file", "shutil.copyfile"])
def test_a_full_disk_is_one_error(tmp_path, old, monkeypatch, place):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(WriteError, match=rf"{tmp_path / 'new'} cannot be written \(No space left on device\)"):
        convert.convert_checkpoint(str(old), str(tmp_path / "new"))
    assert [*tmp_path.iterdir()] == [old.parent]
