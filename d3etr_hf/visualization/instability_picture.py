"""How much matchings changed between two visits of an image, over a training: a panel a kind, a line a layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from d3etr_hf.training.instability import (
    ADAPTIVE,
    AUXILIARY_ASSIGNMENT,
    OWN_ASSIGNMENT,
    TEACHER_ASSIGNMENT,
    logged_instability,
)
from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH

TITLES = {
    ADAPTIVE: "adaptive matching",
    OWN_ASSIGNMENT: "own assignment",
    AUXILIARY_ASSIGNMENT: "own, auxiliary group",
    TEACHER_ASSIGNMENT: "given by the teacher",
}
PANEL_SIZE = (2.9, 2.5)  # inches
INCHES_OF_LEGEND = 0.9
# the lightest yellow is not seen on white
LAST_COLOUR = 0.85


def draw_instability(history: Sequence[Mapping], path: Path) -> bool:
    """Draw what a run has logged of its instability (`log_instability`).

    Args:
        history: the run's `trainer.state.log_history`.
        path: the PNG to write; its folder must exist.

    Returns:
        Whether there was anything to draw.
    """
    found = logged_instability(history)
    kinds = [kind for kind in TITLES if kind in found]
    if not kinds:
        return False
    layers = sorted({layer for of_layers in found.values() for layer in of_layers})
    colours = {
        layer: colormaps["viridis"](LAST_COLOUR * index / max(1, len(layers) - 1))
        for index, layer in enumerate(layers)
    }
    size = (PANEL_SIZE[0] * len(kinds) + INCHES_OF_LEGEND, PANEL_SIZE[1])
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    handles: dict[int, Line2D] = {}
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set_title(TITLES[kind], fontsize=9)
        handles |= _draw_panel(axes, found[kind], colours)
    panels[0].set_ylim(bottom=0)  # of all panels, so not before the last is drawn: no line raises a limit that is set
    panels[0].set_ylabel("queries with another partner, %", fontsize=8)
    figure.legend(
        [handles[layer] for layer in layers],
        [f"layer {layer}" for layer in layers],
        loc="outside right center",
        frameon=False,
        fontsize=8,
    )
    # without a library's version, the same history is drawn as the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})
    return True


def _draw_panel(
    axes: Axes, of_layers: Mapping[int, Sequence[tuple[int, float]]], colours: Mapping[int, tuple]
) -> dict[int, Line2D]:
    """Draw one kind; its lines by layer."""
    lines = {}
    for layer, points in sorted(of_layers.items()):
        (lines[layer],) = axes.plot(
            [step for step, _ in points],
            [100 * share for _, share in points],
            color=colours[layer],
            linewidth=1.4,
            marker="o" if len(points) < 30 else None,
            markersize=2.5,
        )
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return lines
