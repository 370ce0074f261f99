"""A mistyped place is told first, as what it is, before any model or image is loaded."""

import sys
from pathlib import Path
from typing import NoReturn

import pytest

from d3etr_hf.cli import analyze, evaluate, training_run, visualize
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import DatasetError, DetectorLoadError, WriteError
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.data.coco_files import coco, write_split
from tests.tiny import tiny_config


@pytest.fixture
def data(tmp_path: Path) -> str:
    for split in ("train", "val"):
        write_split(tmp_path / "teeth", coco(), split)
    return str(tmp_path / "teeth")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("loaded before all places were looked for")

    for module, names in (
        (evaluate, ["load_detector", "load_splits"]),
        (training_run, ["load_splits", "load_teacher", "build_model", "load_image_processor"]),
        (visualize, ["load_detector", "choose_images"]),
        (analyze, ["detector_of"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, loaded)


def train(tmp_path: Path, data: str, teacher: str | None, **model: str) -> None:
    options = model or {"model_config": {"model_type": tiny_config().model_type}}
    training_run.build_trainer(
        ModelArguments(**options),
        TeacherArguments(teacher),
        DataArguments(data_folder=data),
        D3etrTrainingArguments(str(tmp_path / "run"), use_cpu=True),
    )


def test_train_and_distill(tmp_path: Path, data: str) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(DatasetError, match="data_folder .*teethh': there is no such folder; did you mean .*teeth'"):
        train(tmp_path, f"{data}h", str(tmp_path / "teachr"))
    with pytest.raises(DetectorLoadError, match="teacher .*teachr': there is no such folder.*did you mean .*teacher'"):
        train(tmp_path, data, str(tmp_path / "teachr"))
    with pytest.raises(DetectorLoadError, match="model .*nowhere': there is no such folder"):
        train(tmp_path, data, None, model=str(tmp_path / "nowhere"))
    with pytest.raises(DetectorLoadError, match="backbone_weights .*nowhere': there is no such folder"):
        train(tmp_path, data, None, model_config="configs/a.yaml", backbone_weights=str(tmp_path / "nowhere"))


def test_evaluate(tmp_path: Path, data: str) -> None:
    with pytest.raises(DatasetError, match="data_folder .*there is no such folder"):
        evaluate.evaluate_detector(
            DataArguments(data_folder=f"{data}h"), "nowhere", str(tmp_path / "out"), use_cpu=True
        )


@pytest.mark.parametrize(
    ("data_suffix", "option", "error", "message"),
    [
        ("h", "model", DatasetError, "data_folder .*teethh'"),
        ("", "model", DetectorLoadError, "model .*nowhere': there is no such folder"),
    ],
)
def test_visualize(tmp_path, data, data_suffix, option, error, message, monkeypatch) -> None:
    argv = ["visualize", "--data_folder", data + data_suffix, f"--{option}", str(tmp_path / "nowhere")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(error, match=message):
        visualize.main()


def test_analyze_and_folders_that_cannot_be_made(tmp_path, data, monkeypatch) -> None:
    """Whatever would be written is placed before the long work."""
    (tmp_path / "file").touch()

    def call(module, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["d3etr", *arguments, "--output_dir", str(tmp_path / "file")])
        module.main()

    with pytest.raises(DatasetError, match="data_folder .*teethh'"):
        call(analyze, "nowhere", "--data_folder", f"{data}h")
    with pytest.raises(WriteError, match="file cannot be written .File exists"):
        call(analyze, "nowhere")
    monkeypatch.setattr(visualize, "family_of_checkpoint", lambda *arguments: None)
    with pytest.raises(WriteError, match="file cannot be written .File exists"):
        call(visualize, "--model", "nowhere", "--data_folder", data)
