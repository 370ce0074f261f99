"""What a training shows: little on the terminal, everything in its log history and to trackers."""

import re

import pytest

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.training import progress
from d3etr_hf.training.progress import LogLines, LogLinesBesideBar, Pace, scores_of
from tests.shapes_fixture import SIDE, shapes_trainer


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


def test_short_lines_and_a_full_history(shapes, tmp_path, capsys):
    options = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    trainer = shapes_trainer(shapes, tmp_path, **options)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    loss = r"step %d/4: loss [\d.]+, learning rate [\d.e-]+, [\d.]+ s a step, \d:\d\d:\d\d left, [\d.]+ GiB"
    wanted = [loss % 2, loss % 4, r"step 4/4: AP \d\.\d{3}, AP50 \d\.\d{3}, evaluated in [\d.]+ s"]
    assert len(lines) == 3 and all(re.fullmatch(*pair) for pair in zip(wanted, lines, strict=True)), lines
    first, _, evaluation, *_ = trainer.state.log_history
    assert sum(name.startswith("loss/") for name in first) == 12 and "grad_norm" in first
    assert {"eval_AP/circle", "eval_AR_100"} <= evaluation.keys()


def test_beside_the_bars_as_well(shapes, tmp_path, capsys):
    trainer = shapes_trainer(shapes, tmp_path, disable_tqdm=False, teacher=None)
    trainer.train()
    shown = capsys.readouterr()
    assert shown.out.count(": loss ") == 2 and "'loss'" not in shown.out and "2/2" in shown.err
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks if isinstance(callback, LogLines)]
    assert kinds == [LogLinesBesideBar]


def test_pace_by_a_clock_of_our_own(monkeypatch):
    """Steps of 2 s, the first evaluated for 10 s after the second: 2 s a step, and (2 + 2 + 10 + 2) / 3 s to come."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    pace = Pace()
    for step in (5, 6, 7):
        pace.begin_step(step)
        now[0] += 2
        pace.end_step()
        if step == 6:
            assert pace.read() == 2
            now[0] += 10
            pace.pause()
    assert pace.read() == 2 and pace.read() is None
    assert pace.remaining(8, 11).total_seconds() == 16


def test_several_data_sets_are_told_apart():
    logs = {"eval_day_AP": 0.5, "eval_day_AP75": 0.1, "eval_day_AP50": 0.75, "eval_night_AP": 0.25}
    logs |= {"eval_day_runtime": 1.0, "eval_night_runtime": 2.0, "eval_day_AP/cat": 0.3}
    assert scores_of(logs) == ["day AP 0.500", "day AP50 0.750", "night AP 0.250", "evaluated in 3 s"]
    assert scores_of({"train_runtime": 1.0}) == []


def test_every_term_reaches_tensorboard(shapes, tmp_path, monkeypatch):
    """Read back by TensorBoard itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = shapes_trainer(shapes, tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "board").rglob("events.*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    told = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    checked = 0
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name.startswith(("loss", "eval_AP", "learning_rate")):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                assert told[tag, entry["step"]] == pytest.approx(value, rel=1e-5)
                checked += 1
    assert checked > 2 * 14
