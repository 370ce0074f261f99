"""Training curves: which lines are in which panel, and that all of them are drawn."""

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from d3etr_hf.visualization import training_curves
from d3etr_hf.visualization.training_curves import draw_training_curves
from tests.recorded_figures import record_figures
from tests.visualization.drawn import pixels_of


def history(*keys, steps=(10, 20, 30)):
    """A Trainer's log history: losses at each step, then an evaluation and the closing summary."""
    logs = [{"step": step, "epoch": step / 10} | {key: 5.0 / step for key in keys} for step in steps]
    return [*logs, {"eval_AP": 0.3, "eval_loss": 1.0, "step": steps[-1]}, {"train_runtime": 2.0, "step": steps[-1]}]


def test_one_panel_per_term_over_groups_and_runs():
    histories = {
        "student alone": history("loss", "loss/student/class", "learning_rate", "grad_norm"),
        "distilled": history(
            "loss",
            "loss/student/class",
            "loss/student/class/layer_0",
            "loss/auxiliary/class",
            "loss/self_attention/auxiliary",
        ),
    }
    panels = training_curves._panels(histories)
    lines = {title: [(run, group) for run, group, _, _ in lines] for title, lines in panels.items()}
    assert lines == {
        "total loss": [("student alone", ""), ("distilled", "")],
        "class": [("student alone", "student"), ("distilled", "student"), ("distilled", "auxiliary")],
        "self attention": [("distilled", "auxiliary")],
        "learning rate": [("student alone", "")],
        "validation AP": [("student alone", ""), ("distilled", "")],
    }
    assert panels["total loss"][0][2:] == ([10, 20, 30], [0.5, 0.25, pytest.approx(1 / 6)])
    assert panels["validation AP"][1][2:] == ([30], [0.3])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("loss/auxiliary/self_attention", ("self attention", "auxiliary")),
        ("loss/self_attention/student_group", ("self attention", "student")),
        ("loss/student_class", ("class", "student")),
        ("loss/box_giou", ("box giou", "")),
        ("loss/distillation/auxiliary/prediction", ("distillation, prediction", "auxiliary")),
        ("loss/students_choice", ("students choice", "")),
    ],
)
def test_the_group_is_read_from_the_key(key, expected):
    assert training_curves._term_and_group(key) == expected


def test_training_curves_are_drawn_for_every_run(tmp_path, monkeypatch):
    """A loss of zero has no place on a logarithmic scale; a NaN must neither end the report nor change the scale."""
    figures = record_figures(monkeypatch, training_curves)
    histories = {f"run {index}": history("loss", "loss/student/class", "loss/prediction") for index in range(8)}
    histories["run 0"][0]["loss/student/class"] = 0.0
    histories["run 1"][0]["loss/prediction"] = float("nan")
    draw_training_curves(histories, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as file:
        assert file.format == "PNG"
        picture = np.asarray(file.convert("RGB"))
    assert picture.shape[1] == pytest.approx(3 * training_curves.PANEL_SIZE[0] * training_curves.DOTS_PER_INCH, abs=2)
    scales = {axes.get_title(): axes.get_yscale() for axes in figures[0].axes}
    assert scales == {"total loss": "log", "class": "linear", "prediction": "log", "validation AP": "linear"}
    notes = [text.get_text() for axes in figures[0].axes for text in axes.texts]
    assert notes == ["the sum of all terms of each run:\nruns of other terms have other sums"]
    assert all(len(axes.lines) == 8 for axes in figures[0].axes)
    for colour in training_curves.RUN_COLOURS:
        assert pixels_of(picture, colors.to_rgb(colour))[0].size > 0  # at least in the legend


def test_histories_without_curves_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['empty'\] have no key 'loss'"):
        draw_training_curves({"empty": [{"step": 1, "train_runtime": 2.0}]}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
