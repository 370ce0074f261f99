"""A comparison's picture has the right bars and dots."""

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from d3etr_hf.visualization import comparison as module
from d3etr_hf.visualization.comparison import TEACHER_COLOUR, draw_comparison
from d3etr_hf.visualization.training_curves import RUN_COLOURS
from tests.recorded_figures import record_figures
from tests.runs.test_comparison import TRAINED, comparison
from tests.visualization.drawn import pixels_of
from tests.visualization.test_comparison_tables import ENTRIES, LINES, line


def test_bars_are_means_and_dots_are_seeds(tmp_path, monkeypatch):
    figures = record_figures(monkeypatch, module)
    pairs = {"teachers": ["b"], "students": ["a"]}
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1], pairs=pairs)
    draw_comparison(made, LINES, tmp_path / "comparison.png")
    (axes,) = figures[0].axes
    bars = sorted(
        (bar.get_x() + bar.get_width() / 2, bar.get_height(), bar.get_facecolor()[:3]) for bar in axes.patches
    )
    grey, blue, orange = (colors.to_rgb(each) for each in (TEACHER_COLOUR, *RUN_COLOURS[:2]))
    assert [height for _, height, _ in bars] == pytest.approx([70, 15, 50, 15, 45])
    assert [colour for _, _, colour in bars] == [grey, blue, orange, blue, orange]
    dots = sorted(tuple(dot) for drawn in axes.collections for dot in drawn.get_offsets())
    expected = [[70], [10, 20], [40, 60], [15], [35, 55]]
    beside = module.DOTS_BESIDE
    wanted = [
        (x - beside * (len(values) > 1), value)
        for (x, _, _), values in zip(bars, expected, strict=True)
        for value in values
    ]
    np.testing.assert_allclose(dots, wanted)
    # 12.706 is t of two seeds; far beyond the axis, which follows the seeds
    intervals = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines]
    ends = [(mean - 12.706 * half, mean + 12.706 * half) for mean, half in ((15, 5), (50, 10), (45, 10))]
    places = [bars[index][0] + beside for index in (1, 2, 4)]
    np.testing.assert_allclose(intervals, [(x, x, *pair) for x, pair in zip(places, ends, strict=True)], rtol=1e-4)
    assert axes.get_ylim() == pytest.approx((0, 1.25 * 70))
    middles = [np.mean([x for x, _, _ in bars[part]]) for part in (slice(0, 3), slice(3, 4), slice(4, 5))]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "b→a"]
    assert list(axes.get_xticks()) == pytest.approx(middles)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["teacher", "alone", "distilled"]
    with Image.open(tmp_path / "comparison.png") as file:
        picture = np.asarray(file.convert("RGB"))
    for colour in (grey, blue, orange):
        on_white = [module.BAR_OPACITY * part + 1 - module.BAR_OPACITY for part in colour]
        assert pixels_of(picture, on_white)[0].size > 500


def test_the_same_results_are_drawn_as_the_same_bytes(tmp_path):
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1])
    for name in ("one.png", "two.png"):
        draw_comparison(made, LINES, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_of_many_modes_each_bar_stands_over_its_name(tmp_path, monkeypatch):
    """In every entry: each bar's height tells which mode it is of."""
    figures = record_figures(monkeypatch, module)
    modes = [f"mode_{index}" for index in range(7)]
    made = comparison(entries={"a": TRAINED, "b": TRAINED}, modes=modes, mode_options={mode: {} for mode in modes})
    lines = [
        line(entry, mode, 0, first + index / 100)
        for entry, first in (("a", 0.1), ("b", 0.5))
        for index, mode in enumerate(modes)
    ]
    draw_comparison(made, lines, tmp_path / "comparison.png")
    (axes,) = figures[0].axes
    middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    of_bars = [modes[round(bar.get_height()) % 10] for bar in axes.patches]
    assert list(axes.get_xticks()) == pytest.approx(middles) and len(middles) == 14
    assert [tick.get_text() for tick in axes.get_xticklabels()] == of_bars
    entries = {text.get_text(): text.xy[0] for text in axes.texts}
    assert entries == {"a": pytest.approx(middles[3]), "b": pytest.approx(middles[10])}
