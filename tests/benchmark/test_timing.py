"""Times add up, turn by turn, and memory is a peak."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d3etr_hf.evaluation.timing import interleaved, seconds_of, spread
from scripts.benchmarking.timing import peak_memory, timed_parts


def test_parts_do_not_count_what_their_own_parts_take():
    """Else shares of a step would add up to more than the step."""
    module = SimpleNamespace()
    module.inner = lambda: time.sleep(0.02)

    def outer():
        time.sleep(0.01)
        module.inner()
        module.inner()

    module.outer = outer
    with timed_parts({"outer": [(module, "outer")], "inner": [(module, "inner")]}) as seconds:
        whole = seconds_of(lambda: (module.outer(), module.inner()))
    assert seconds["inner"] == pytest.approx(0.06, abs=0.02)
    assert seconds["outer"] == pytest.approx(0.01, abs=0.008)
    assert sum(seconds.values()) <= whole
    assert module.outer is outer  # put back


def test_an_error_inside_a_part_passes_through():
    module = SimpleNamespace(fails=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), timed_parts({"part": [(module, "fails")]}):
        module.fails()


def test_interleaved_times_everything_every_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, rounds=4, warmup=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [order[start : start + 3] for start in range(3, len(order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len({tuple(one) for one in rounds}) > 1


def test_spread():
    assert spread(np.array([4.0, 1.0, 2.0, 3.0, 5.0])) == {"median": 3.0, "low": 2.0, "high": 4.0}


def below_peak() -> float:
    """MiB that this process must take to be back at its peak; where nothing tells, more than that."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    return peak_memory() - int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) / 2**10


def test_peak_memory_grows_by_what_is_allocated():
    before = peak_memory()
    kept = np.ones(int((below_peak() + 64) * 2**20 / 8))
    assert peak_memory() > before + 32 and kept[-1] == 1
