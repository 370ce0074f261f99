"""AP over steps and over seconds: what is drawn where, from the lines of the results alone."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from d3etr_hf.visualization import comparison_curves as module
from d3etr_hf.visualization.comparison_curves import draw_budgets, draw_curves
from tests.recorded_figures import record_figures
from tests.runs.test_comparison import TRAINED, comparison


def line(mode, seed, seconds, *evaluations, family="a") -> dict:
    ends = {"steps": 20, "seconds": seconds, "AP": 0.5}
    return {"family": family, "mode": mode, "seed": seed, "evaluations": [list(each) for each in evaluations]} | ends


LINES = [
    line("alone", 0, 20.0, (5, 0.9), (10, 0.1), (20, 0.3)),
    line("alone", 1, 30.0, (10, 0.2), (15, 0.9), (20, 0.7)),
    line("alone", 2, 80.0, (10, 0.6), (20, 0.5)),
    line("distilled", 0, 40.0, (10, 0.4), (20, 0.8)),
    line("distilled", 0, 1.0, (10, 0.9), (20, 0.9), family="b"),
]


def test_means_bands_and_paces(tmp_path, monkeypatch):
    """Steps that one seed alone was evaluated at are left out; the median pace alone is 30 seconds in 20 steps."""
    figures = record_figures(monkeypatch, module)
    made = comparison(entries={"a": TRAINED, "b": TRAINED}, modes=["alone", "teacherless", "distilled"], seeds=[0, 1])
    assert draw_curves(made, LINES, "a", tmp_path / "one.png")
    over_steps, over_seconds = figures[0].axes
    assert [drawn.get_label() for drawn in over_steps.lines] == ["alone", "distilled"]
    means, bands = [[30, 50], [40, 80]], [([10, 30], [60, 70]), ([40, 80], [40, 80])]
    for axes, places in ((over_steps, [[10, 20], [10, 20]]), (over_seconds, [[15, 30], [20, 40]])):
        for drawn, band, x, mean, (low, high) in zip(axes.lines, axes.collections, places, means, bands, strict=True):
            np.testing.assert_allclose(drawn.get_xydata(), np.stack([x, mean], axis=1))
            corners = {tuple(np.round(corner, 6)) for corner in band.get_paths()[0].vertices}
            assert corners == {*zip(x, low, strict=True), *zip(x, high, strict=True)}
    colours = [drawn.get_color() for drawn in over_steps.lines]
    assert colours == [drawn.get_color() for drawn in over_seconds.lines] and colours[0] != colours[1]
    assert draw_curves(made, LINES, "a", tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_modes_of_one_colour_have_other_lines_and_no_bands(tmp_path, monkeypatch):
    figures = record_figures(monkeypatch, module)
    modes = [f"mode_{index}" for index in range(14)]
    made = comparison(entries={"a": TRAINED}, modes=modes, mode_options={mode: {} for mode in modes})
    draw_curves(made, [line(mode, 0, 20.0, (10, 0.1), (20, 0.3)) for mode in modes], "a", tmp_path / "many.png")
    drawn = [(str(each.get_color()), each.get_linestyle()) for each in figures[0].axes[0].lines]
    assert len(set(drawn)) == 14 and not figures[0].axes[0].collections


@pytest.mark.parametrize("lines", [[], [line("alone", 0, 20.0, (10, 0.1))], LINES[-1:]])
def test_nothing_to_draw(lines, tmp_path):
    assert not draw_curves(comparison(entries={"a": TRAINED}), lines, "a", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def budget(entry, mode, seed, steps, seconds, ap) -> dict:
    return {"family": entry, "mode": mode, "seed": seed, "steps": steps, "seconds": seconds, "AP": ap}


def of_length(steps, **student) -> dict:
    return {"teacher": "teacher", "student": {"max_steps": steps} | student}


BUDGETS = [
    budget("long", "alone", 0, 40, 44.0, 0.5),
    budget("long", "alone", 1, 40, 80.0, 0.7),
    budget("short", "alone", 0, 10, 10.0, 0.1),
    budget("long", "distilled", 0, 40, 80.0, 0.8),
    budget("short", "distilled", 0, 11, 22.0, 0.3),
    budget("short", "distilled", 1, 12, 24.0, 0.4),
    budget("short", "distilled", 2, 19, 38.0, 0.5),
    {"family": "short", "mode": "alone", "seed": 1, "seconds": 9.0, "AP": 0.9},  # it says no steps
    budget("other", "alone", 1, 20, 24.0, 0.9),
    budget("long", "teacher", 0, 400, 24.0, 0.9),
]


def test_budgets_are_joined_where_length_alone_differs(tmp_path, monkeypatch):
    """By the median steps, whatever the order of the entries; a step takes 1.1 seconds alone and 2 distilled."""
    figures = record_figures(monkeypatch, module)
    entries = {"long": of_length(40), "short": of_length(10, num_train_epochs=2)}
    assert draw_budgets(comparison(entries=entries), BUDGETS, tmp_path / "one.png")
    over_steps, over_seconds = figures[0].axes
    drawn = {each.get_label(): each.get_xydata().round(6).tolist() for each in over_steps.lines}
    assert drawn == {"alone": [[10, 10], [40, 60]], "distilled": [[12, 40], [40, 80]]}
    assert [each.get_xdata().round(6).tolist() for each in over_seconds.lines] == [[11, 44], [24, 80]]
    # what is of one seed, among means of more, is hollow
    hollow = [each for each in over_seconds.collections if isinstance(each, PathCollection)]
    assert [each.get_offsets().round(6).tolist() for each in hollow] == [[[11, 10]], [[80, 80]]]
    assert [each.get_facecolor().tolist() for each in hollow] == [[[1, 1, 1, 1]]] * 2
    corners = over_steps.collections[0].get_paths()[0].vertices.round(6).tolist()
    assert {tuple(corner) for corner in corners} == {(10, 10), (40, 50), (40, 70)}


@pytest.mark.parametrize(
    "entries",
    [
        {"long": of_length(40)},
        {"long": of_length(40), "short": of_length(10, learning_rate=1e-3)},
        {"long": of_length(40), "short": of_length(10) | {"teacher": "another"}},
        {"long": of_length(40), "short": of_length(10) | {"options": {"weight_decay": 0}}},
        {"missing": of_length(40), "short": of_length(10)},
    ],
)
def test_no_budgets(entries, tmp_path):
    assert not draw_budgets(comparison(entries=entries), BUDGETS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
