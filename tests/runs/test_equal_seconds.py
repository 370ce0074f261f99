"""As many steps as take another run's seconds, by the paces of both kinds of run."""

import pytest

from d3etr_hf.runs.equal_seconds import options_in_full, seconds_per_step, steps_in_equal_seconds
from d3etr_hf.runs.planned_run import plan
from tests.runs.test_comparison import LONGER, TRAINED, comparison


def record(steps, seconds) -> dict:
    return {"steps": steps, "seconds": seconds}


def test_steps_by_hand():
    """Steps of 0.3 seconds beside steps of 0.2, and both twice as slow where the machine is busy, are 1.5 to one.

    One pair of which one run alone was disturbed moves no median, and paces of different seeds are not compared: by
    their medians, 0.6 and 0.2, it would be 3000.
    """
    other = [record(1000, 600.0), record(1000, 300.0), record(500, 400.0)]
    own = [record(1000, 400.0), record(100, 20.0), record(1000, 200.0)]
    assert seconds_per_step(other) == 0.6 and seconds_per_step(own) == 0.2
    assert steps_in_equal_seconds(1000, zip(other, own, strict=True)) == 1500
    assert steps_in_equal_seconds(1, [(record(1, 0.1), record(1, 9.0))]) == 1


def test_what_else_the_machine_did_does_not_count():
    """Where both have counted what the processor did for them: 3 times as long, which took 300 seconds and 900."""
    other, own = record(100, 300.0) | {"processor_seconds": 30.0}, record(100, 900.0) | {"processor_seconds": 10.0}
    assert steps_in_equal_seconds(100, [(other, own)]) == 300
    assert steps_in_equal_seconds(100, [(other, record(100, 900.0))]) == 33


@pytest.fixture
def runs(tmp_path) -> dict:
    """By mode and seed, of one entry; 3 steps of its student."""
    made = comparison(
        output_dir=str(tmp_path),
        entries={"a": TRAINED},
        modes=["alone", "distilled", "longer"],
        seeds=[0, 1],
        mode_options=LONGER,
    )
    return {(run.mode, run.seed): run for run in plan(made)}


def lines_of(runs, **seconds) -> dict:
    """Seed 0 stopped early, after two of three steps; all of a mode took so many seconds a step."""
    return {
        run.key: record(2 + seed, seconds[mode] * (2 + seed)) for (mode, seed), run in runs.items() if mode in seconds
    }


def test_a_run_takes_the_steps_of_its_own_seed(runs):
    lines = lines_of(runs, alone=1.0, distilled=2.5)
    assert options_in_full(runs["longer", 0], lines)["max_steps"] == 5  # 2 · 2.5
    longer, alone = runs["longer", 1], runs["alone", 1]
    options = options_in_full(longer, lines)
    assert options["max_steps"] == 8  # 3 · 2.5 = 7.5, to the even number
    assert {name for name in options if options[name] != alone.options[name]} == {"max_steps", "output_dir"}
    assert options_in_full(alone, lines) == alone.options


def test_it_is_the_other_runs_length_that_counts(runs):
    """Which may have other steps than the mode that is trained: 40 of 1.5 seconds are 30 of 2."""
    lines = {run.key: record(40, 60.0) if mode == "distilled" else record(3, 6.0) for (mode, _), run in runs.items()}
    assert options_in_full(runs["longer", 1], lines)["max_steps"] == 30


def test_a_run_that_has_been_started_keeps_its_length(runs):
    """What it would be by now does not matter, nor whether the others are known any more."""
    longer = runs["longer", 0]
    longer.folder.mkdir(parents=True)
    (longer.folder / "run.yaml").write_text("max_steps: 77\n")
    assert options_in_full(longer, {})["max_steps"] == 77
