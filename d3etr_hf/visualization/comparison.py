"""A comparison of runs as Markdown tables, and as bars with a dot for every seed and the interval of the mean."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d3etr_hf.runs.comparison import DISTILLED, TEACHER, Comparison, Entry
from d3etr_hf.runs.comparison_statistics import Spread, differences, spread, values_of
from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH, shaded
from d3etr_hf.visualization.lettering import lettering, written
from d3etr_hf.visualization.training_curves import RUN_COLOURS

MISSING = "—"
TEACHER_COLOUR = "#999999"
INCHES_PER_BAR, INCHES_BETWEEN = 0.4, 0.4
SMALLEST_WIDTH, HEIGHT = 5.0, 4.2  # inches
ENTRIES_WITH_LEVEL_NAMES = 3
INCHES_PER_LETTER = 0.1  # of a legend
TURNED = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
BAR_OPACITY = 0.75
DOTS_BESIDE = 0.15  # of the middle of a bar, which is one wide; the interval is on the other side


def format_comparison(comparison: Comparison, lines: Sequence[dict]) -> str:
    """Everything a comparison has found so far, as Markdown.

    Args:
        comparison: which entries, modes, pairs and seeds there are.
        lines: of its finished runs; see `runs.comparison_results`.

    Returns:
        AP, AP50, steps and seconds by entry and mode; the differences from the baseline, paired by seed, and from
        modes that were given the same seconds; the pairs.
    """
    seeds = ", ".join(map(str, comparison.seeds))
    over_seeds = f"mean ± standard deviation over seeds {seeds}" if len(comparison.seeds) > 1 else f"seed {seeds}"
    blocks = [
        f"AP (0..100), {over_seeds}:",
        format_values(comparison, lines, "AP", 100, 1),
        f"AP50 (0..100), {over_seeds}:",
        format_values(comparison, lines, "AP50", 100, 1),
    ]
    if differences_table := format_differences(comparison, lines):
        at = ", at equal steps" if steps_are_equal(comparison, lines) else ""
        blocks += [f"AP minus AP {comparison.subtracted}, of the same seed{at}:", differences_table]
    if at_equal_seconds := format_equal_seconds(comparison, lines):
        blocks += [
            "At equal seconds, AP minus AP of the same seed; a mode that takes the seconds of another has as many "
            "steps as fit by the median seconds a step of the runs of either, since machines are not always as fast:",
            at_equal_seconds,
        ]
    if comparison.pairs is not None:
        blocks += [
            f"AP {DISTILLED} minus AP {comparison.subtracted} of the same seed and student, and AP {DISTILLED}, by "
            "teacher and student:",
            format_pairs(comparison, lines),
        ]
    if any(map(comparison.equal_seconds, comparison.modes)):
        blocks += ["Steps of training:", format_values(comparison, lines, "steps", 1, 0)]
    blocks += ["Seconds of training:", format_values(comparison, lines, "seconds", 1, 0)]
    return "\n\n".join(blocks) + "\n"


def format_values(comparison: Comparison, lines: Sequence[dict], measure: str, scale: float, digits: int) -> str:
    """A Markdown table of one measure: a row an entry, its student's parameters, its teacher, and a column a mode."""
    rows = []
    for name in comparison.entries:
        entry = comparison.entry(name)
        cells = [count_parameters(lines, name)]
        cells += [
            format_spread(values_of(lines, *column, measure), scale, digits, expected)
            for column, expected in columns_of(comparison, entry)
        ]
        rows.append([name, *cells])
    return markdown(["family", "parameters", TEACHER, *comparison.modes], rows)


def columns_of(comparison: Comparison, entry: Entry) -> list[tuple[tuple[str, str], int]]:
    """Entry and mode of each column of an entry's row, and how many seeds it is to have: the teacher, the modes."""
    teacher = (entry.teacher_entry or entry.name, TEACHER)
    modes = [((entry.name, mode), len(comparison.seeds)) for mode in comparison.modes]
    return [(teacher, len(comparison.teacher_seeds)), *modes]


def format_differences(comparison: Comparison, lines: Sequence[dict]) -> str:
    """A Markdown table of AP minus the baseline's, by entry and mode: each seed's, their mean and its interval."""
    rows = []
    for name in comparison.entries:
        baseline = values_of(lines, name, comparison.subtracted) if comparison.subtracted else {}
        for mode in comparison.modes:
            found = differences(values_of(lines, name, mode), baseline)
            if mode == comparison.subtracted or comparison.equal_seconds(mode) or not found:
                continue
            rows.append([name, mode, *difference_cells(found)])
    columns = ["family", "mode", "difference", "each seed's (seed)", "95 % t-interval of the mean"]
    return markdown(columns, rows) if rows else ""


def steps_are_equal(comparison: Comparison, lines: Sequence[dict]) -> bool:
    """Whether all of each entry's students took as many steps, but for those that were given a mode's seconds."""
    taken: dict[str, set[int | None]] = {}
    for line in lines:
        if line["mode"] != TEACHER and comparison.equal_seconds(line["mode"]) is None:
            taken.setdefault(line["family"], set()).add(line.get("steps"))
    return all(len(steps) == 1 and None not in steps for steps in taken.values())


def format_equal_seconds(comparison: Comparison, lines: Sequence[dict]) -> str:
    """A Markdown table of what a mode is ahead of one that was given the same seconds, as `format_differences`."""
    rows = []
    for name in comparison.entries:
        for mode in comparison.modes:
            if (equal := comparison.equal_seconds(mode)) is None:
                continue
            found = differences(values_of(lines, name, equal.other), values_of(lines, name, mode))
            if found:
                rows.append([name, f"{equal.other} minus {mode}", *difference_cells(found)])
    columns = ["family", "modes", "difference", "each seed's (seed)", "95 % t-interval of the mean"]
    return markdown(columns, rows) if rows else ""


def difference_cells(found: dict[int, float]) -> list[str]:
    """Mean, each seed's and interval of differences of AP (0..1)."""
    difference = spread(found)
    by_seed = ", ".join(f"{signed(value)} ({seed})" for seed, value in found.items())
    return [signed(difference.mean), by_seed, format_interval(difference)]


def format_pairs(comparison: Comparison, lines: Sequence[dict]) -> str:
    """A Markdown table of teachers × students: the gain of the distilled student over the baseline, and its AP."""
    teachers, students = comparison.pairs["teachers"], comparison.pairs["students"]
    rows = []
    for teacher in teachers:
        cells = []
        for student in students:
            values = values_of(lines, comparison.pair(teacher, student).name, DISTILLED)
            gains = differences(values, values_of(lines, student, comparison.subtracted))
            if not gains:
                cells.append(MISSING)
                continue
            gain, ap = spread(gains), spread(values)
            deviation = "" if gain.deviation is None else f" ± {100 * gain.deviation:.1f}"
            cells.append(f"{signed(gain.mean)}{deviation} (AP {100 * ap.mean:.1f})")
        rows.append([teacher, *cells])
    return markdown(["teacher \\ student", *students], rows)


def count_parameters(lines: Iterable[dict], entry: str) -> str:
    """The parameters of an entry's student, which are the same in every run."""
    counts = {line["parameters"] for line in lines if line["family"] == entry and line["mode"] != TEACHER}
    return f"{max(counts):,}" if counts else MISSING


def format_spread(by_seed: dict[int, float], scale: float, digits: int, expected: int) -> str:
    """ "53.5 ± 1.2", or "53.5" of one value; how many seeds there are is said where more are expected."""
    if not by_seed:
        return MISSING
    found = spread(by_seed)
    deviation = "" if found.deviation is None else f" ± {scale * found.deviation:.{digits}f}"
    part = f" ({len(by_seed)} of {expected} seeds)" if len(by_seed) < expected else ""
    return f"{scale * found.mean:.{digits}f}{deviation}{part}"


def format_interval(found: Spread) -> str:
    """ "+1.0 to +3.0"; one value has none."""
    return MISSING if found.interval is None else " to ".join(map(signed, found.interval))


def signed(difference: float) -> str:
    """A difference of AP (0..1) with its sign, times 100."""
    return f"{100 * difference:+.1f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
