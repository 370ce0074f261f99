"""Training curves of several runs over each other: one panel a loss term, and the validation AP.

Drawn with matplotlib's Figure objects, without pyplot and its global state.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH, shaded
from d3etr_hf.visualization.lettering import lettering, written

# No yellow on white, and dark enough for thin lines.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GROUP_LINE_STYLES = {"": "solid", "student": "solid", "auxiliary": (0, (4, 1.5))}
GROUP_IN_KEY = re.compile(r"(?:^|[/_])(student|auxiliary)(?:_group)?(?=[/_]|$)")
LAYER_IN_KEY = re.compile(r"/layer_\d+$")
PANEL_COLUMNS = 3
PANEL_SIZE = (4.2, 2.7)  # inches
TOTAL_LOSS_TITLE = "total loss"
TOTAL_LOSS_NOTE = "the sum of all terms of each run:\nruns of other terms have other sums"
LEARNING_RATE_TITLE = "learning rate"
AVERAGE_PRECISION_TITLE = "validation AP"
LAST_PANELS = {"learning_rate": LEARNING_RATE_TITLE, "eval_AP": AVERAGE_PRECISION_TITLE}

# (run, group, steps, values)
Line = tuple[str, str, list[int], list[float]]


def has_curves(histories: Mapping[str, Sequence[Mapping]]) -> bool:
    """Whether any run has logged what `draw_training_curves` draws."""
    return bool(_panels(histories))


def draw_training_curves(histories: Mapping[str, Sequence[Mapping]], path: str | Path) -> None:
    """Draws the training curves of several runs over each other, and writes a PNG.

    The panels are: the total loss, with a note that it sums different terms; one per loss term (keys "loss/..."; the
    terms of the student and the auxiliary group share a panel, told apart by line style: the words "student" and
    "auxiliary" in the key name the group); the learning rate; and the validation AP. Losses are on a logarithmic scale
    where all their values are positive. Single decoder layers (keys ".../layer_3") are left out.

    Args:
        histories: run name → that run's `trainer.state.log_history`.
        path: the PNG to write; its folder must exist.

    Raises:
        ValueError: no run has logged any of these.
    """
    panels = _panels(histories)
    if not panels:
        raise ValueError(
            f"the histories of the runs {list(histories)} have no key 'loss', 'loss/...' or 'eval_AP': pass "
            "`trainer.state.log_history` of runs that have logged at least once."
        )
    with lettering([*histories, *panels]):
        _draw_panels(panels, list(histories), path)


def _draw_panels(panels: Mapping[str, list[Line]], runs: list[str], path: str | Path) -> None:
    column_count = min(PANEL_COLUMNS, len(panels))
    row_count = math.ceil(len(panels) / column_count)
    figure = Figure(
        figsize=(PANEL_SIZE[0] * column_count, PANEL_SIZE[1] * row_count + 0.5),
        dpi=DOTS_PER_INCH,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    run_colours = {
        run: shaded(RUN_COLOURS[index % len(RUN_COLOURS)], -0.4 * (index // len(RUN_COLOURS) % 2))
        for index, run in enumerate(runs)
    }
    for index, (title, lines) in enumerate(panels.items()):
        _draw_panel(figure.add_subplot(row_count, column_count, index + 1), title, lines, run_colours)
    groups = {group for lines in panels.values() for _, group, _, _ in lines}
    handles = _legend(run_colours, groups)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(handles), 2 * column_count), frameon=False
    )
    figure.savefig(path, format="png")


def _draw_panel(axes: Axes, title: str, lines: Sequence[Line], run_colours: Mapping[str, tuple]) -> None:
    for run, group, steps, values in lines:
        axes.plot(
            steps,
            values,
            color=run_colours[run],
            linestyle=GROUP_LINE_STYLES[group],
            linewidth=1.5,
            marker="o" if len(steps) < 30 else None,
            markersize=3,
        )
    axes.set_title(written(title), fontsize=11, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if title == TOTAL_LOSS_TITLE:
        place = {"ha": "right", "va": "top", "transform": axes.transAxes}
        axes.text(0.98, 0.96, TOTAL_LOSS_NOTE, fontsize=7, color="0.35", **place)
    if title in (AVERAGE_PRECISION_TITLE, LEARNING_RATE_TITLE):
        axes.set_ylim(bottom=0)
    elif not any(value <= 0 for _, _, _, values in lines for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.5, not 5 × 10⁻¹
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(run_colours: Mapping[str, tuple], groups: set[str]) -> list[Line2D]:
    """A line for each run, and for each group of queries that is drawn."""
    runs = [Line2D([], [], color=colour, linewidth=2.5, label=written(run)) for run, colour in run_colours.items()]
    return runs + [
        Line2D([], [], color="0.3", linestyle=GROUP_LINE_STYLES[group], label=f"{group} group")
        for group in GROUP_LINE_STYLES
        if group and group in groups
    ]


def _panels(histories: Mapping[str, Sequence[Mapping]]) -> dict[str, list[Line]]:
    """Panel title → its lines: total loss first, learning rate and AP last."""
    lines: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {TOTAL_LOSS_TITLE: {}}
    last: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {title: {} for title in LAST_PANELS.values()}
    for run, history in histories.items():
        for entry in history:
            for key, value in entry.items():
                if key == "loss":
                    lines[TOTAL_LOSS_TITLE].setdefault((run, ""), []).append((entry["step"], value))
                elif key in LAST_PANELS:
                    last[LAST_PANELS[key]].setdefault((run, ""), []).append((entry["step"], value))
                elif key.startswith("loss/") and not LAYER_IN_KEY.search(key):
                    title, group = _term_and_group(key)
                    lines.setdefault(title, {}).setdefault((run, group), []).append((entry["step"], value))
    lines |= last
    return {
        title: [(run, group, *map(list, zip(*points, strict=True))) for (run, group), points in series.items()]
        for title, series in lines.items()
        if series
    }


def _term_and_group(key: str) -> tuple[str, str]:
    """("self attention", "student") of "loss/student/self_attention"; the group is "" where the key names none."""
    term = key.removeprefix("loss/")
    found = GROUP_IN_KEY.search(term)
    if found is not None:
        term = term[: found.start()] + term[found.end() :]
    return term.strip("/_").replace("_", " ").replace("/", ", ") or "group total", found.group(1) if found else ""
