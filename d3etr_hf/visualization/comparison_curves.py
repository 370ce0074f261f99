"""AP over steps and over seconds, a line a mode: on the way of a comparison's runs, or at the end of each budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d3etr_hf.runs.comparison import Comparison
from d3etr_hf.runs.comparison_statistics import values_of
from d3etr_hf.runs.equal_seconds import seconds_per_step
from d3etr_hf.visualization.comparison import mode_colours
from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH
from d3etr_hf.visualization.lettering import lettering, written
from d3etr_hf.visualization.training_curves import RUN_COLOURS

SIZE, INCHES_PER_LEGEND_ROW = (9.5, 3.8), 0.22
LEGEND_ROWS_OF_SIZE = 12  # that fit beside the panels
LINE_STYLES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))
BAND_OPACITY = 0.15


@dataclass(frozen=True)
class Curve:
    """A mode's AP (0..100) over steps.

    Attributes:
        steps: at which there are values.
        values: at each, one a seed, at least one.
        seconds_per_step: of the mode's runs, the median.
    """

    steps: list[float]
    values: list[list[float]]
    seconds_per_step: float


def curves_of(comparison: Comparison, lines: Sequence[dict], entry: str) -> dict[str, Curve]:
    """By mode the AP of an entry's students on their way, over the seeds, at the steps that all have in common.

    Seconds are steps times the median seconds a step of the mode's runs, so that seeds that ran on a busier machine do
    not lie elsewhere.

    Args:
        lines: see `runs.comparison_results`; those without `evaluations` are left out.
    """
    curves = {}
    for mode in comparison.modes:
        found = [line for line in lines if (line["family"], line["mode"]) == (entry, mode) and "evaluations" in line]
        by_step = [dict(map(tuple, line["evaluations"])) for line in found]
        steps = set.intersection(*map(set, by_step)) if by_step else set()
        if len(steps) > 1:
            curves[mode] = _curve({step: [ap[step] for ap in by_step] for step in steps}, found)
    return curves


def _curve(by_steps: Mapping[float, Sequence[float]], lines: Sequence[dict]) -> Curve:
    """Of AP (0..1) by steps, a value a seed, and the lines that say how long a step takes."""
    steps = sorted(by_steps)
    return Curve(steps, [[100 * ap for ap in by_steps[each]] for each in steps], seconds_per_step(lines))


def draw_curves(comparison: Comparison, lines: Sequence[dict], entry: str, path: Path) -> bool:
    """Draw an entry's AP over steps and over seconds: the mean of the seeds, in a band from lowest to highest.

    Of more modes than there are colours no bands are drawn, which would hide each other.

    Args:
        comparison: which modes there are.
        lines: of its finished runs.
        path: the PNG to write; its folder must exist.

    Returns:
        Whether there was anything to draw: runs that were evaluated on their way.
    """
    curves = curves_of(comparison, lines, entry)
    if curves:
        with lettering([entry]):
            _draw(comparison, curves, entry, path)
    return bool(curves)


def budgets_of(comparison: Comparison, lines: Sequence[dict]) -> dict[str, Curve]:
    """By mode the AP at the end of the runs, over the seeds, by how many steps these took; see `curves_of`.

    Args:
        comparison: its entries differ in nothing but the length of their runs.
        lines: see `runs.comparison_results`; those without `steps` are left out.
    """
    curves = {}
    for mode in comparison.modes:
        of_mode = [line for line in lines if line["mode"] == mode and "steps" in line]
        found = [line for line in of_mode if line["family"] in comparison.entries]
        budgets = {}
        for entry in comparison.entries:
            if values := values_of(found, entry, mode):
                # runs that were given the seconds of others differ a little in their steps
                steps = median(line["steps"] for line in found if line["family"] == entry)
                budgets[steps] = list(values.values())
        if len(budgets) > 1:
            curves[mode] = _curve(budgets, found)
    return curves


def draw_budgets(comparison: Comparison, lines: Sequence[dict], path: Path) -> bool:
    """Draw what each budget comes to, every dot the mean of runs with a whole schedule; see `draw_curves`.

    Returns:
        Whether there was anything to draw: entries that differ in nothing but the length of their runs.
    """
    curves = budgets_of(comparison, lines) if comparison.differs_in_length_alone else {}
    if curves:
        _draw(comparison, curves, "at the end of each budget", path)
    return bool(curves)


def _draw(comparison: Comparison, curves: dict[str, Curve], title: str, path: Path) -> None:
    height = SIZE[1] + INCHES_PER_LEGEND_ROW * max(0, len(curves) - LEGEND_ROWS_OF_SIZE)
    figure = Figure(figsize=(SIZE[0], height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    colours = mode_colours(comparison)
    for mode, curve in curves.items():
        style = {
            "color": colours[mode],
            "linestyle": LINE_STYLES[comparison.modes.index(mode) // len(RUN_COLOURS) % len(LINE_STYLES)],
            "linewidth": 1.6,
            "marker": "o" if len(curve.steps) < 30 else None,
            "markersize": 3.5,
            "label": mode,
        }
        seconds = [curve.seconds_per_step * step for step in curve.steps]
        for axes, places in ((over_steps, curve.steps), (over_seconds, seconds)):
            axes.plot(places, list(map(mean, curve.values)), **style)
            if len(curves) <= len(RUN_COLOURS):
                band = list(map(min, curve.values)), list(map(max, curve.values))
                axes.fill_between(places, *band, color=colours[mode], alpha=BAND_OPACITY, linewidth=0)
            # among means of several seeds a single one is not to look as sure
            of_one = [at for at, values in enumerate(curve.values) if len(values) == 1]
            if 0 < len(of_one) < len(curve.values):
                dots = [places[at] for at in of_one], [curve.values[at][0] for at in of_one]
                axes.scatter(*dots, s=22, facecolor="white", edgecolor=colours[mode], linewidth=1.2, zorder=3)
    over_steps.set_ylabel("validation AP", fontsize=9)
    over_steps.set_xlabel("optimizer steps", fontsize=9)
    over_seconds.set_xlabel("seconds of training (steps × median seconds a step)", fontsize=9)
    for axes in (over_steps, over_seconds):
        _tidy(axes)
    figure.suptitle(written(title), fontsize=11, fontweight="bold")
    handles, labels = over_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    # without a library's version, the same results are drawn as the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})


def _tidy(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
