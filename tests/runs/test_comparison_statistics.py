"""Means, deviations, intervals and paired differences, against tables of the t-distribution and SciPy's own test."""

import pytest
from scipy import stats

from d3etr_hf.runs.comparison_statistics import devices_of, differences, differing_inputs, spread, values_of


def test_two_seeds_by_hand():
    """Student's t with one degree of freedom: 12.706 at 97.5 %; n - 1 below the deviation."""
    found = spread({0: 0.2, 1: 0.4})
    assert found.mean == pytest.approx(0.3)
    assert found.deviation == pytest.approx(0.2 / 2**0.5)
    assert found.interval == pytest.approx((0.3 - 12.706 * 0.1, 0.3 + 12.706 * 0.1), abs=1e-4)


def test_three_seeds_against_scipy():
    values = [0.11, 0.35, 0.23]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert spread(dict(enumerate(values))).interval == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_spread():
    found = spread({4: 0.5})
    assert (found.mean, found.deviation, found.interval, found.by_seed) == (0.5, None, None, {4: 0.5})


def test_values_are_of_one_entry_and_mode_in_the_order_of_seeds():
    """A difference is of runs of one seed; a seed that lacks either has none."""
    lines = [
        {"family": family, "mode": mode, "seed": seed, "AP": ap}
        for family, mode, seed, ap in (
            ("a", "alone", 2, 0.1),
            ("a", "alone", 0, 0.2),
            ("a", "distilled", 0, 0.5),
            ("a", "distilled", 1, 0.6),
            ("b", "alone", 0, 0.9),
        )
    ]
    alone, distilled = (values_of(lines, "a", mode) for mode in ("alone", "distilled"))
    assert list(alone.items()) == [(0, 0.2), (2, 0.1)]
    assert differences(distilled, alone) == pytest.approx({0: 0.3})
    assert values_of(lines, "a", "alone", "AP50") == {} == values_of(lines, "c", "alone")


READ = {"training annotations": "t", "validation annotations": "v", "teacher": "w", "model to start from": "m"}


@pytest.mark.parametrize(
    ("entry", "mode", "seed", "changed", "said"),
    [
        ("a", "distilled", 1, {}, []),
        ("a", "distilled", 1, {"training annotations": "u"}, ["a distilled: the training annotations"]),
        ("a", "few_labels", 1, {"training annotations": "u"}, []),  # a mode may have data of its own
        ("a", "few_labels", 1, {"validation annotations": "u"}, ["a: the validation annotations"]),
        ("c→a", "distilled", 1, {"validation annotations": "u"}, ["a: the validation annotations"]),
        ("a", "distilled", 1, {"model to start from": "u"}, ["a distilled: the model to start from"]),
        ("a", "pretrained", 0, {"model to start from": "u"}, []),
        ("a", "few_labels", 0, {"teacher": "u"}, ["a: the teacher"]),
        ("a", "distilled", 1, {"teacher": "u"}, ["a: the teacher"]),
        ("c→a", "distilled", 0, {"teacher": "u"}, []),
        ("a", "teacher", 0, {name: "u" for name in READ}, []),
    ],
)
def test_what_compared_runs_have_read_otherwise(entry, mode, seed, changed, said):
    lines = [{"family": "a", "mode": "distilled", "seed": 0, "inputs": READ}]
    lines += [{"family": "b", "mode": "distilled", "seed": 0, "inputs": dict.fromkeys(READ, "other")}]
    lines += [{"family": "a", "mode": "alone", "seed": 0}]
    lines += [{"family": entry, "mode": mode, "seed": seed, "inputs": READ | changed}]
    assert differing_inputs(lines, teacher_of_each_seed=False) == said
    of_seeds = [] if seed == 1 and "teacher" in changed else said
    in_words = [each.replace("a: the teacher", "a seed 0: the teacher") for each in of_seeds]
    assert differing_inputs(lines, teacher_of_each_seed=True) == in_words


def test_devices_of_runs():
    lines = [{"device": device, "threads": threads} for device, threads in (("CPU", 1), ("H100", 1), ("H100", 1))]
    found = devices_of([*lines, {"device": "CPU", "threads": 2}, {"seconds": 3}])
    assert list(found.items()) == [("H100, threads: 1", 2), ("CPU, threads: 1", 1), ("CPU, threads: 2", 1)]
