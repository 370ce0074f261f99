"""Broken config.json files: one line each that names the checkpoint and the field, and no code of others is run."""

import json
import os

import pytest

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import load_detector, load_teacher
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_detector, load_teacher])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"-1": "a", "0": "b", "1": "c"}}, "id2label .* 3 keys, which must be 0 to 2.*-1 is out of line"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "id2label .* 2 is out of line"),
        ({"id2label": {"0": "a", "one": "b"}}, "id2label .* no whole number.*'one'"),
        ({"id2label": {"0": "a", "1": "A ", "2": "c"}}, "id2label .* names 1 classes twice, as 'a'"),
        ({"id2label": {"0": "a", "1": None, "2": "c"}}, "id2label .* name that is no text"),
        ({"id2label": ["a", "b", "c"]}, "id2label .* must give a name to each class"),
        ({"id2label": {"0": "a", "1": "b"}}, "tensors are of another shape than config.json says"),
        ({"model_type": "nonsense", "auto_map": {"AutoConfig": "evil.Config"}}, "'nonsense'.*never run"),
        ({"model_type": None}, "model_type is None in its config.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation is 'flash_attention_2'"),
        ([1, 2], "no model configuration|must hold a model's fields"),
    ],
)
def test_broken_configurations_are_named(saved, tmp_path, monkeypatch, load, change, message):
    def asked(*prompt):
        raise AssertionError("nobody is there to answer")

    monkeypatch.setattr("builtins.input", asked)
    fields = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change if isinstance(change, dict) else change))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    with pytest.raises(DetectorLoadError, match=message) as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_outputs_that_no_class_uses_may_share_a_name(tmp_path):
    """COCO's 91 outputs for 80 classes, as the authors' checkpoints name them."""
    names = {0: "N/A", 1: "circle", 2: "N/A"}
    tiny_model(id2label=names, label2id={"N/A": 0, "circle": 1}).save_pretrained(tmp_path)
    assert load_detector(str(tmp_path)).config.id2label == names


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"model_type": ' + b"[" * 100_000,
        b'{"model_type": "detr", "d_model": ' + b"9" * 5000 + b"}",
        b'{"model_type": "detr", "dropout": 1e999}',
        b'{"model_type": "d\xff"}',
        b"",
        None,
    ],
    ids=["deep", "deep within", "long number", "infinite", "no UTF-8", "empty", "a named pipe"],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, content):
    if content is None:
        os.mkfifo(tmp_path / "config.json")
    else:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DetectorLoadError, match="no model configuration could be read|dropout is inf") as caught:
        load_detector(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 600


def test_a_setting_of_attention_within_the_backbone_is_refused(saved, tmp_path):
    fields = json.loads((saved / "config.json").read_text())
    fields["backbone_config"]["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DetectorLoadError, match="_attn_implementation is 'flash_attention_2'"):
        load_detector(str(tmp_path))
