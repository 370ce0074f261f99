"""Seconds of training alone, over all interruptions."""

import pytest
from transformers import TrainerControl, TrainerState

from d3etr_hf.errors import DamagedFileError
from d3etr_hf.runs.stopwatch import Stopwatch


def test_stopwatch_counts_steps_only_and_across_interruptions(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()

    def after(seconds, call):
        now[0] += seconds
        call(None, state, control)

    watch = Stopwatch(tmp_path)
    after(50, watch.on_train_begin)  # loading
    after(2, watch.on_step_end)
    after(30, watch.on_evaluate)
    after(3, watch.on_step_end)
    after(7, watch.on_save)
    assert watch.seconds == 5
    after(11, watch.on_step_end)  # lost: the run stops before it is saved

    again = Stopwatch(tmp_path)
    after(1000, again.on_train_begin)
    after(4, again.on_step_end)
    assert again.seconds == 9


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 3}', '{"seconds": "many"}'])
def test_damaged_seconds_are_named_with_the_remedy(tmp_path, content):
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(
        DamagedFileError, match="seconds.json is damaged.*the seconds of training are counted from zero"
    ):
        Stopwatch(tmp_path)
