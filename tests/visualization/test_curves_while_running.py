"""The curves of a training that is under way."""

import json

import pytest
from transformers import TrainerState

from d3etr_hf.files import write_errors
from d3etr_hf.visualization import curves_while_running
from d3etr_hf.visualization.curves_while_running import CurvesWhileRunning


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(curves_while_running.time, "perf_counter", lambda: now[0])
    return now


def test_drawn_at_evaluations_by_the_main_process_and_cheaply(tmp_path, monkeypatch, clock):
    """Drawing takes three seconds here: while training it is done once in a minute, and once more at the end."""
    drawn = []

    def draw(histories, path):
        ((name, history),) = histories.items()
        drawn.append((name, len(history)))
        path.write_bytes(b"drawn")
        clock[0] += 3

    monkeypatch.setattr(curves_while_running, "draw_training_curves", draw)
    callback, state = CurvesWhileRunning(tmp_path / "run", "history.json"), TrainerState()
    (tmp_path / "run").mkdir()

    def evaluate():
        state.log_history.append({"eval_AP": 0.5, "step": 1})
        callback.on_evaluate(None, state, None)
        written = tmp_path / "run" / "history.json"
        assert not state.is_world_process_zero or json.loads(written.read_text()) == state.log_history

    state.is_world_process_zero = False
    evaluate()
    assert drawn == []
    state.is_world_process_zero = True
    callback.on_train_begin(None, state, None)
    for _ in range(4):
        evaluate()
        clock[0] += 25
    callback.on_train_end(None, state, None)
    evaluate()
    assert drawn == [("run", 2), ("run", 5), ("run", 6)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curves.png", "history.json"]


def test_the_picture_is_there_before_the_end(tmp_path):
    callback, state = CurvesWhileRunning(tmp_path, "history.json"), TrainerState()
    callback.on_train_begin(None, state, None)
    state.log_history = [{"loss": 2.0, "learning_rate": 1e-4, "step": 1}, {"eval_AP": 0.5, "step": 1}]
    callback.on_evaluate(None, state, None)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_no_failure(tmp_path):
    """Nothing was logged yet, and a validation split without objects has no AP."""
    callback, state = CurvesWhileRunning(tmp_path, "history.json"), TrainerState()
    state.log_history = [{"eval_runtime": 2.0, "step": 1}]
    callback.on_evaluate(None, state, None)
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.parametrize("name", ["draw_training_curves", "write_json"])
def test_a_full_disk_ends_no_training_and_is_told_once(tmp_path, monkeypatch, caplog, name):
    def full(*args):
        with write_errors(tmp_path / "file"):
            raise OSError(28, "No space left on device")

    (tmp_path / "curves.png").write_bytes(b"whole")
    monkeypatch.setattr(curves_while_running, name, full)
    callback, state = CurvesWhileRunning(tmp_path, "history.json"), TrainerState()
    state.log_history = [{"loss": 2.0, "step": 1}]
    for _ in range(2):
        callback.on_evaluate(None, state, None)
    assert caplog.text.count("No space left on device") == 1 and (tmp_path / "curves.png").read_bytes() == b"whole"
