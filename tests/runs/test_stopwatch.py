"""Seconds of training alone, over all interruptions."""

import pytest
from transformers import TrainerControl, TrainerState

from d3etr_hf.errors import DamagedFileError
from d3etr_hf.runs.stopwatch import Stopwatch


def test_stopwatch_counts_steps_only_and_across_interruptions(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[0] / 2)  # the machine is busy
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()

    def after(seconds, call):
        now[0] += seconds
        call(None, state, control)

    watch = Stopwatch(tmp_path, on_cpu=True)
    after(50, watch.on_train_begin)  # loading
    after(2, watch.on_step_end)
    after(30, watch.on_evaluate)
    after(3, watch.on_step_end)
    after(7, watch.on_save)
    assert watch.spent == {"seconds": 5, "processor_seconds": 2.5}
    after(11, watch.on_step_end)  # lost: the run stops before it is saved

    again = Stopwatch(tmp_path, on_cpu=True)
    after(1000, again.on_train_begin)
    after(4, again.on_step_end)
    assert again.spent == {"seconds": 9, "processor_seconds": 4.5}

    on_gpu = Stopwatch(tmp_path)  # where the processor waits for it
    after(4, on_gpu.on_step_end)
    after(0, on_gpu.on_save)
    assert on_gpu.spent == {"seconds": 9}
    back = Stopwatch(tmp_path, on_cpu=True)  # it does not know the processor's time of the steps before
    after(1, back.on_step_end)
    assert back.spent == {"seconds": 10}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"steps": 3}', '{"seconds": "many"}', '{"seconds": 3, "processor_seconds": null}']
)
def test_damaged_seconds_are_named_with_the_remedy(tmp_path, content):
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(
        DamagedFileError, match="seconds.json is damaged.*the seconds of training are counted from zero"
    ):
        Stopwatch(tmp_path, on_cpu=True)
