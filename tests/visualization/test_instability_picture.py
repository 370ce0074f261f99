"""How much matchings changed, over a training: a panel a kind, a line a layer, in per cent."""

import numpy as np

from d3etr_hf.visualization import instability_picture as module
from d3etr_hf.visualization.instability_picture import draw_instability
from tests.recorded_figures import record_figures

HISTORY = [
    {"step": step, **{f"instability/{kind}/layer_{layer}": share / (layer + 1) for layer in range(layers)}}
    for step, share in ((5, 0.8), (10, 0.4))
    for kind, layers in (("teacher_given", 1), ("adaptive", 2))
]


def test_panels_and_lines(tmp_path, monkeypatch):
    figures = record_figures(monkeypatch, module)
    assert draw_instability([*HISTORY, {"step": 10, "eval_AP": 0.3}], tmp_path / "one.png")
    adaptive, given = figures[0].axes
    assert (adaptive.get_title(), given.get_title()) == ("adaptive matching", "given by the teacher")
    for axes, lines in ((adaptive, [[80, 40], [40, 20]]), (given, [[80, 40]])):
        for drawn, shares in zip(axes.lines, lines, strict=True):
            np.testing.assert_allclose(drawn.get_xydata(), [[5, shares[0]], [10, shares[1]]])
    assert adaptive.lines[0].get_color() == given.lines[0].get_color() != adaptive.lines[1].get_color()
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["layer 0", "layer 1"]
    assert draw_instability(HISTORY, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_every_panel_shows_its_lines(tmp_path, monkeypatch):
    """A kind may change far more than the one that is drawn before it."""
    figures = record_figures(monkeypatch, module)
    keys = {"instability/adaptive/layer_0": 0.1, "instability/own/layer_0": 0.7}
    draw_instability([{"step": step, **keys} for step in (5, 10)], tmp_path / "one.png")
    for axes in figures[0].axes:
        low, high = axes.get_ylim()
        assert low == 0 and high >= max(axes.lines[0].get_ydata())
    assert len(figures[0].axes) == 2


def test_nothing_to_draw(tmp_path):
    assert not draw_instability([{"step": 1, "loss": 2.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_every_kind_has_its_own_title(tmp_path, monkeypatch):
    """By the names that the log has: of each kind another share is drawn."""
    figures = record_figures(monkeypatch, module)
    shares = {"adaptive": 0.1, "own": 0.2, "auxiliary_own": 0.3, "teacher_given": 0.4}
    logged = {f"instability/{kind}/layer_0": share for kind, share in shares.items()}
    draw_instability([{"step": step, **logged} for step in (5, 10)], tmp_path / "one.png")
    drawn = {axes.get_title(): round(axes.lines[0].get_ydata()[0]) for axes in figures[0].axes}
    assert drawn == {
        "adaptive matching": 10,
        "own assignment": 20,
        "own, auxiliary group": 30,
        "given by the teacher": 40,
    }
