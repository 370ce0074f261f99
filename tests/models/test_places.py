"""Whatever is pointed at as a model, every command names the folder that was meant, or the command that makes one."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from d3etr_hf.cli.benchmark import measure_costs
from d3etr_hf.cli.evaluate import evaluate_detector
from d3etr_hf.data import DataArguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import ModelArguments, build_model, check_teacher, load_detector, model_type_of
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.onnx_check import export_and_check
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, and what people name in its place."""
    root = tmp_path_factory.mktemp("what people name")
    tiny_model().save_pretrained(root / "good")
    weights = {"model": tiny_model().state_dict()}
    for file in ("ConditionalDETR_r50.pth", "pth_folder/checkpoint.pth", "model.ckpt"):
        (root / file).parent.mkdir(exist_ok=True)
        torch.save(weights, root / file)
    shutil.copytree(root / "good", root / "runs" / "checkpoint-500")
    (root / "empty").mkdir()
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (root / "stray.safetensors").write_bytes(b"")
    make_shapes(root / "data", 1, 1, image_size=64, progress=False)
    return root


def conversion(path: Path) -> str:
    return f"d3etr convert {shlex.quote(str(path))} NEW_FOLDER"


MEANT = {
    "good/model.safetensors": lambda root: f"is a file: name the folder, {root / 'good'}",
    "good/config.json": lambda root: f"is a file: name the folder, {root / 'good'}",
    "ConditionalDETR_r50.pth": lambda root: conversion(root / "ConditionalDETR_r50.pth"),
    "model.ckpt": lambda root: conversion(root / "model.ckpt"),
    "pth_folder": lambda root: conversion(root / "pth_folder" / "checkpoint.pth"),
    "runs": lambda root: f"holds no config.json: name one of those in it, {root / 'runs' / 'checkpoint-500'}",
    "adapter": lambda root: "it is an adapter of PEFT; merge it into its model",
    "stray.safetensors": lambda root: "name a folder that holds config.json and model.safetensors",
    "empty": lambda root: "name one that holds config.json and model.safetensors",
    "absent/folder/of/mine": lambda root: "there is no such folder, and it is no Hub id",
}


@pytest.mark.parametrize("place", MEANT)
def test_what_was_meant_is_named(places, place):
    """For a teacher, a model to go on from, one to evaluate, export, time and compare with, before any is read."""
    path, data = str(places / place), DataArguments(data_folder=str(places / "data"))
    calls = {
        "teacher": lambda: check_teacher(path),
        "model": lambda: model_type_of(ModelArguments(model=path)),
        "start": lambda: build_model(ModelArguments(model=path), ["circle"]),
        "visualized": lambda: load_detector(path, "compare"),
        "evaluated": lambda: evaluate_detector(data, path, str(places / "evaluation"), use_cpu=True),
        "exported": lambda: export_and_check(path),
        "timed": lambda: measure_costs([path], use_cpu=True),
        "compared": lambda: CardArguments(compare=[f"alone={path}"]).check_places(),
    }
    for name, call in calls.items():
        with pytest.raises(DetectorLoadError) as caught:
            call()
        message = str(caught.value)
        assert MEANT[place](places) in message and repr(path) in message and "\n" not in message, name
    assert not list(places.glob("**/*.onnx*"))


def test_a_name_longer_than_any_file_has():
    with pytest.raises(DetectorLoadError, match="there is no such folder, and it is no Hub id"):
        load_detector("x" * 300)
