"""The demonstration, with runs of a few steps."""

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
from PIL import Image
from tqdm.auto import tqdm

from d3etr_hf.cli import demonstration
from d3etr_hf.cli.demonstration import (
    equal_time_steps,
    format_table,
    prepare_teacher,
    run_demo,
    show_progress,
    train_one,
)
from d3etr_hf.configurations import shipped
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import DemoError

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ["teacher", "student_alone", "teacherless", "distilled", "student_alone_equal_time"]


def test_whole_demonstration(tmp_path, monkeypatch, capsys, fresh_processes):
    """Five models, one table, three pictures; called again it says that it is done and trains nothing.

    One student is launched as in earnest; the other commands run in processes that start faster.
    """

    def train_faster(name: str, command: list[str], folder: Path) -> dict:
        if name == "student_alone":
            return train_one(name, command, folder)
        script = REPOSITORY / "scripts" / f"{command[0]}.py"
        result = fresh_processes.script(script, *command[1:], "--output_dir", folder / name)
        assert result.returncode == 0, result.stderr
        return json.loads((folder / name / "results.json").read_text())

    monkeypatch.chdir(tmp_path)  # away from the repository
    monkeypatch.setattr("d3etr_hf.cli.demonstration.train_one", train_faster)
    monkeypatch.setattr(
        "d3etr_hf.cli.demonstration.make_shapes",
        lambda folder, train_images=32: make_shapes(folder, 32, 8, progress=False),
    )
    overrides = ["--max_steps", "3", "--warmup_steps", "1", "--save_steps", "2", "--per_device_train_batch_size", "2"]
    rows = run_demo(tmp_path / "demo", tmp_path / "shapes", overrides=overrides)
    said = capsys.readouterr().out
    assert re.search(r"The teacher \(7\d\d,\d{3} parameters\) has AP [89]\d\.\d", said)
    assert [row["name"] for row in rows] == NAMES
    assert rows == json.loads((tmp_path / "demo" / "results.json").read_text())
    for row in rows:
        assert 0 <= row["AP"] <= row["AP50"] <= 1 and row["seconds"] > 0
        assert (tmp_path / "demo" / row["name"] / "model.safetensors").exists()
    assert rows[0]["parameters"] >= 2 * rows[1]["parameters"] == 2 * rows[3]["parameters"]
    assert [row["steps"] for row in rows[1:4]] == [3, 3, 3] and rows[0]["steps"] > 1000
    spent = json.loads((tmp_path / "demo" / "distilled" / "seconds.json").read_text())
    first_save = {"seconds": 4.0, "steps": 2}
    assert rows[4]["steps"] >= 1 and spent["steps"] == 3
    finished = Future()
    finished.set_result(None)
    (tmp_path / "started" / "distilled").mkdir(parents=True)
    (tmp_path / "started" / "distilled" / "seconds.json").write_text(json.dumps(first_save))
    # 2 seconds a step against 0.5: four times the steps; and a run that has been started keeps its length
    assert equal_time_steps(tmp_path / "started", {"seconds": 5.0, "steps": 10}, finished) == 40
    assert equal_time_steps(tmp_path / "demo", {"seconds": 5.0, "steps": 10}, finished) == rows[4]["steps"]
    for picture in ("teacher.png", "detections.png", "curves.png"):
        assert Image.open(tmp_path / "demo" / picture).size[0] > 500
    card = (tmp_path / "demo" / "distilled" / "README.md").read_text()
    assert "| teacher |" in card and "| student alone, equal time |" in card and "attention.png" in card
    capsys.readouterr()
    assert run_demo(tmp_path / "demo", tmp_path / "shapes", overrides=overrides) == rows
    assert "done already" in capsys.readouterr().out
    assert "student_alone_equal_time" in format_table(rows)


def test_the_teacher_is_trained_where_that_is_asked_for(tmp_path, monkeypatch):
    """By the command of its card, on twice as many scenes."""
    called = []

    def train(name, command, folder):
        called.append((name, command))
        shutil.copytree(shipped("model_cards") / "shapes_teacher", folder / name)

    scenes = []
    monkeypatch.setattr("d3etr_hf.cli.demonstration.train_one", train)
    monkeypatch.setattr(
        "d3etr_hf.cli.demonstration.make_shapes",
        lambda folder, train_images: scenes.append((folder, train_images)) or folder,
    )
    make_shapes(tmp_path / "shapes", 2, 2, progress=False)
    prepare_teacher(tmp_path, tmp_path / "shapes", train=True)
    ((name, command),) = called
    assert name == "teacher" and scenes == [(tmp_path / "teacher_data", 8000)]
    assert command[:2] == ["train", str(shipped("configs") / "demo" / "teacher.yaml")]
    assert command[2:] == ["--data_folder", str(tmp_path / "teacher_data")]


def test_a_teacher_that_was_trained_here_stays(tmp_path, monkeypatch):
    """The one that comes with the package is copied where there is none, or only such a copy."""
    shown = []
    monkeypatch.setattr(demonstration, "evaluate_detector", lambda *_: shown.append("") or {"AP": 0.5})
    monkeypatch.setattr(demonstration, "draw_demo_detections", lambda *_: None)
    place = tmp_path / "teacher"
    for _ in range(2):
        prepare_teacher(tmp_path, tmp_path, train=False)
    assert (place / "model.safetensors").stat().st_size > 1000
    (place / "model.safetensors").write_bytes(b"trained here")
    (place / "run.yaml").touch()
    prepare_teacher(tmp_path, tmp_path, train=False)
    assert (place / "model.safetensors").read_bytes() == b"trained here" and len(shown) == 3
    (place / "results.json").unlink()
    with pytest.raises(DemoError, match="not finished: pass --train_teacher true to finish it"):
        prepare_teacher(tmp_path, tmp_path, train=False)


def test_failed_run_names_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from the repository
    with pytest.raises(DemoError, match=r"'teacher' failed.*logs/teacher.log(.|\n)*no such configuration file"):
        train_one("teacher", ["train", "missing.yaml"], tmp_path)


def test_progress_follows_the_training_bar(tmp_path):
    """Not the short bars of evaluation and saving."""
    log = tmp_path / "log"
    log.write_bytes(b" 10%|# | 120/1200 [00:10<00:90]\r 50%|## | 2/4 [00:00<00:00]\r100%|###| 1/1 [00:00<00:00]")
    with tqdm(disable=False) as bar:
        show_progress(log, 0, bar)
        assert (bar.n, bar.total) == (120, 1200)
