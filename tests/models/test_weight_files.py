"""Weights of a checkpoint: no pickle, nothing from elsewhere, and just the tensors that the model has."""

import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SwinConfig
from transformers.utils import logging as transformers_logging

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import FAMILIES, load_detector, load_teacher
from tests.tiny import perturb, tiny_config, tiny_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "bbox_predictor.layers.1.weight"


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


@pytest.fixture
def sharded(tmp_path):
    tiny_model().to_stock().save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / INDEX).exists() and not (tmp_path / "sharded" / FILE).exists()
    return tmp_path / "sharded"


def edit(folder, changes) -> None:
    """A tensor of None goes."""
    tensors = load_file(folder / FILE) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / FILE, {"format": "pt"})


def refused(folder, message, load=load_detector) -> None:
    with pytest.raises(DetectorLoadError, match=message) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_detector, load_teacher])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({HEAD: None}, rf"1 tensors are missing, the first {HEAD}; copy"),
        ({HEAD: torch.zeros(3, 32)}, rf"1 tensors are of another shape .*{HEAD} \[3, 32\] for \[32, 32\]"),
        ({HEAD: torch.ones(32, 32, dtype=torch.int64)}, rf"{FILE}: 1 tensors are no floating point.* {HEAD} \(I64\)"),
        ({HEAD: torch.ones(32, 32, dtype=torch.bool)}, rf"{FILE}: 1 tensors are no floating point.*BOOL"),
        (
            {HEAD: torch.ones(32, 32) * torch.nan},
            rf"1 tensors are not finite, the first {HEAD}; as after .* diverged: take an earlier one, or copy",
        ),
        ({HEAD: torch.ones(32, 32) / 0}, rf"1 tensors are not finite, .*{HEAD}"),
        # of its last layer, or of a part that its layers do not have: another architecture
        (
            {f"model.decoder.layers.3.{name}.weight": torch.ones(2) for name in "abcde"},
            r"5 tensors are of layers of another architecture than config.json says, the first "
            r"model.decoder.layers.3.a.weight, model.decoder.layers.3.b.weight, model.decoder.layers.3.c.weight; copy",
        ),
        ({"model.encoder.layers.0.gate.weight": torch.ones(2)}, r"1 tensors are of layers of another arch.*0\.gate"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, load, changes, message, caplog, capfd):
    edit(folder, changes)
    refused(folder, message, load)
    shown = caplog.text + "".join(capfd.readouterr())
    assert "LOAD REPORT" not in shown and "start afresh" not in shown


@pytest.mark.parametrize(("layers", "left"), [("decoder_layers", 2), ("encoder_layers", 0)])
def test_layers_that_the_configuration_leaves_out_are_refused(folder, layers, left):
    """Transformers loads such a model with a warning: it would be another one than was trained."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {layers: left}))
    refused(folder, rf"tensors are of layers of another architecture .*model\.{layers[:7]}\.layers\.{left}")


@pytest.mark.parametrize("load", [load_detector, load_teacher])
def test_stray_tensors_beside_a_whole_model_are_told_once(folder, load, caplog):
    """As old files have a loss's buffer, a backbone's classifier, or another head."""
    expected = load_detector(str(folder)).state_dict()
    names = ["criterion.empty_weight", "mask_head.layers.0.weight", "model.backbone.fc.weight", "z.bias"]
    edit(folder, {name: torch.ones(3) for name in names})
    caplog.clear()
    torch.testing.assert_close(load(str(folder)).state_dict(), expected, atol=0, rtol=0)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{str(folder)!r}: the weights: 4 tensors are of no part of the model and left out" in told
    assert f"the first {', '.join(names[:3])}" in told and "z.bias" not in told


@pytest.mark.parametrize("family", ["conditional_detr", "rt_detr", "lw_detr"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapper_are_read_without_it_and_told_once(tmp_path, family, prefix, caplog):
    """And what is saved again has the stock model's names."""
    folder = tmp_path / "detector"
    tiny_model(model_type=family).to_stock().save_pretrained(folder)
    expected, names = load_detector(str(folder)).state_dict(), set(load_file(folder / FILE))
    wrapped = {f"{prefix}{name}": value for name, value in load_file(folder / FILE).items()}
    save_file(wrapped, folder / FILE, {"format": "pt"})
    caplog.clear()
    found = load_teacher(str(folder))
    torch.testing.assert_close(found.state_dict(), expected, atol=0, rtol=0)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"begin with '{prefix}'" in told and str(folder) in told
    found.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / FILE)) == names


def test_a_prefix_of_some_tensors_alone_is_no_wrapper(folder):
    edit(folder, {HEAD: None, f"module.{HEAD}": load_file(folder / FILE)[HEAD]})
    refused(folder, f"1 tensors are missing, the first {HEAD}")


def test_other_warnings_of_loading_are_heard(folder, monkeypatch, caplog):
    """Of Transformers and of this package; its report of the tensors alone is left to the errors."""
    family = FAMILIES["conditional_detr"]
    edit(folder, {"stray.weight": torch.ones(3)})
    stock_freeze = family.freeze

    def freeze(model):
        for name in ("transformers.modeling_utils", "d3etr_hf.models.detector"):
            transformers_logging.get_logger(name).warning(f"something else of {name}")
        stock_freeze(model)

    monkeypatch.setattr(family, "freeze", freeze)
    load_detector(str(folder))
    assert "something else of transformers.modeling_utils" in caplog.text
    assert "something else of d3etr_hf.models.detector" in caplog.text and "LOAD REPORT" not in caplog.text


def test_what_old_files_have_besides_is_taken(tmp_path):
    """Batch norm's counters, and buffers that the model computes itself."""
    backbone = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, out_features=["stage2"])
    torch.manual_seed(0)
    model = perturb(FAMILIES["detr"](tiny_config("detr", backbone_config=backbone))).eval()
    model.save_pretrained(tmp_path)
    computed = {name: value.clone() for name, value in model.named_buffers() if name not in model.state_dict()}
    assert any(name.endswith("relative_position_index") for name in computed)
    edit(tmp_path, computed | {"model.backbone.model.norm.num_batches_tracked": torch.tensor(7)})
    torch.testing.assert_close(load_detector(str(tmp_path)).state_dict(), model.state_dict(), atol=0, rtol=0)


class Hostile:
    def __reduce__(self):
        return (print, ("code of a pickle was run",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pth"])
def test_pickles_are_not_opened(folder, name, capfd):
    (folder / FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Hostile()))
    refused(folder, f"its weights are a pickle .'{name}'.*d3etr convert {folder / name} NEW_FOLDER")
    refused(folder / name, f"is a file: make a folder of it .*d3etr convert {folder / name} NEW_FOLDER")
    assert "was run" not in "".join(capfd.readouterr())


def test_shards_are_read(sharded):
    torch.testing.assert_close(load_detector(str(sharded)).state_dict(), tiny_model().state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{nope", f"{INDEX} cannot be read"),
        ("[" * 100_000, f"{INDEX} cannot be read"),
        ("[]", f"{INDEX} must say in weight_map"),
        ({"weight_map": {}}, f"{INDEX} must say in weight_map"),
        ({"weight_map": {HEAD: 3}}, f"{INDEX} must say in weight_map"),
        ({"weight_map": {HEAD: "../outside.safetensors"}}, "names a file outside the checkpoint, '../outside"),
        ({"weight_map": {HEAD: "/tmp/outside.safetensors"}}, "names a file outside the checkpoint"),
        ({"weight_map": {HEAD: ".."}}, "names a file outside the checkpoint"),
        ({"weight_map": {HEAD: "pytorch_model.bin"}}, "'pytorch_model.bin', which is no safetensors file"),
        ({"weight_map": {HEAD: "model-7.safetensors"}}, "names 'model-7.safetensors', which is not there"),
    ],
)
def test_a_damaged_index_is_refused(sharded, content, message):
    save_file({HEAD: torch.ones(32, 32)}, sharded.parent / "outside.safetensors", {"format": "pt"})
    (sharded / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    refused(sharded, message)


def test_a_shard_that_is_lost_or_cut_is_named(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-10])
    refused(sharded, f"{first.name} is damaged")
    first.unlink()
    refused(sharded, f"{INDEX} names '{first.name}', which is not there")
