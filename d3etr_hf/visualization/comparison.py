"""A comparison of runs as bars, with a dot for every seed and the interval of the mean."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d3etr_hf.runs.comparison import DISTILLED, TEACHER, Comparison
from d3etr_hf.runs.comparison_statistics import Spread, spread, values_of
from d3etr_hf.visualization.comparison_tables import columns_of
from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH, shaded
from d3etr_hf.visualization.lettering import lettering, written
from d3etr_hf.visualization.training_curves import RUN_COLOURS

TEACHER_COLOUR = "#999999"
INCHES_PER_BAR, INCHES_BETWEEN = 0.4, 0.4
SMALLEST_WIDTH, HEIGHT = 5.0, 4.2  # inches
ENTRIES_WITH_LEVEL_NAMES = 3
INCHES_PER_LETTER = 0.1  # of a legend
TURNED = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
BAR_OPACITY = 0.75
DOTS_BESIDE = 0.15  # of the middle of a bar, which is one wide; the interval is on the other side


def draw_comparison(comparison: Comparison, lines: Sequence[dict], path: Path) -> None:
    """Draw the validation AP of every entry and pair: a bar a mode, as high as the mean, a dot a seed, the interval.

    Args:
        comparison: which entries, modes and pairs there are.
        lines: of its finished runs, at least one; see `runs.comparison_results`.
        path: the PNG to write; its folder must exist.
    """
    groups = bars_of(comparison, lines)
    with lettering(groups):
        _draw_groups(comparison, groups, path)


def _draw_groups(comparison: Comparison, groups: dict[str, dict[str, Spread]], path: Path) -> None:
    count = sum(len(bars) for bars in groups.values())
    width = max(SMALLEST_WIDTH, 1.2 + INCHES_PER_BAR * count + INCHES_BETWEEN * len(groups))
    figure = Figure(figsize=(width, HEIGHT), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {TEACHER: TEACHER_COLOUR} | mode_colours(comparison)
    middles = draw_bars(axes, groups, colours)
    axes.set_ylabel("validation AP")
    # an interval of two seeds may be far longer than all bars are high
    values = [100 * value for bars in groups.values() for found in bars.values() for value in found.by_seed.values()]
    axes.set_ylim(0, min(1.25 * max(*values, 1), 100))
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(colours) - 1 > len(RUN_COLOURS):  # nobody tells so many colours apart
        name_bars(axes, groups)
    else:
        name_groups(axes, middles, list(map(written, groups)))
        label_colours(figure, axes, colours)
    # without a library's version, the same results are drawn as the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})


def mode_colours(comparison: Comparison) -> dict[str, tuple]:
    """A colour for each mode; from the seventh on they come again, darker."""
    modes = dict.fromkeys([*comparison.modes, *([DISTILLED] if comparison.pairs else [])])
    return {
        mode: shaded(RUN_COLOURS[index % len(RUN_COLOURS)], -0.4 * (index // len(RUN_COLOURS) % 2))
        for index, mode in enumerate(modes)
    }


def name_groups(axes: Axes, middles: Sequence[float], names: Sequence[str]) -> None:
    """The names of the entries under their bars."""
    turned = len(names) > ENTRIES_WITH_LEVEL_NAMES
    axes.set_xticks(middles, names, fontsize=9, **(TURNED if turned else {}))


def label_colours(figure: Figure, axes: Axes, colours: dict[str, tuple]) -> None:
    """A legend of the modes, in their order, in as many rows as its words take."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: list(colours).index(labels[index]))
    fit = int(figure.get_figwidth() / (0.5 + INCHES_PER_LETTER * max(map(len, labels))))
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside upper center",
        ncols=max(1, min(len(labels), fit)),
        frameon=False,
    )


def name_bars(axes: Axes, groups: dict[str, dict[str, Spread]]) -> None:
    """The mode under each bar, and the entries, where there are several, over theirs."""
    left, places, names = 0.0, [], []
    for group, bars in groups.items():
        places += [left + index for index in range(len(bars))]
        names += bars
        if len(groups) > 1:
            axes.annotate(
                written(group),
                (left + (len(bars) - 1) / 2, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=10,
                fontweight="bold",
            )
        left += len(bars) + INCHES_BETWEEN / INCHES_PER_BAR
    axes.set_xticks(places, names, fontsize=8, **TURNED)
    if len(groups) == 1:
        axes.set_title(written(next(iter(groups))), fontsize=11, fontweight="bold")


def bars_of(comparison: Comparison, lines: Sequence[dict]) -> dict[str, dict[str, Spread]]:
    """AP by entry (or pair) and by mode, the teacher's first; what has no run yet is left out."""
    columns = [
        (name, column) for name in comparison.entries for column, _ in columns_of(comparison, comparison.entry(name))
    ]
    columns += [(entry.name, (entry.name, DISTILLED)) for entry in comparison.all_pairs()]
    groups: dict[str, dict[str, Spread]] = {}
    for row, (entry, mode) in columns:
        if by_seed := values_of(lines, entry, mode):
            groups.setdefault(row, {})[mode] = spread(by_seed)
    return groups


def draw_bars(axes: Axes, groups: dict[str, dict[str, Spread]], colours: dict[str, str]) -> list[float]:
    """Draw the groups side by side, each mode labelled once; where the middle of each group is."""
    left, middles, labelled = 0.0, [], set()
    for bars in groups.values():
        for index, (mode, found) in enumerate(bars.items()):
            label = None if mode in labelled else mode
            labelled.add(mode)
            axes.bar(left + index, 100 * found.mean, width=0.85, color=colours[mode], alpha=BAR_OPACITY, label=label)
            beside = 0 if found.interval is None else DOTS_BESIDE
            axes.scatter(
                [left + index - beside] * len(found.by_seed),
                [100 * value for value in found.by_seed.values()],
                s=16,
                color="black",
                edgecolor="white",
                linewidth=0.5,
                zorder=3,
            )
            if found.interval is not None:
                ends = [100 * end for end in found.interval]
                axes.plot(
                    [left + index + beside] * 2, ends, color="black", linewidth=1, marker="_", markersize=7, zorder=2
                )
        middles.append(left + (len(bars) - 1) / 2)
        left += len(bars) + INCHES_BETWEEN / INCHES_PER_BAR
    return middles
