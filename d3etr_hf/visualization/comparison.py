"""A comparison of runs as Markdown tables, and as bars with a dot for every seed."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d3etr_hf.runs.comparison import DISTILLED, TEACHER, Comparison, Entry
from d3etr_hf.runs.comparison_statistics import Spread, differences, spread, values_of
from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH
from d3etr_hf.visualization.lettering import lettering, written
from d3etr_hf.visualization.training_curves import RUN_COLOURS

MISSING = "—"
TEACHER_COLOUR = "#999999"
INCHES_PER_BAR, INCHES_BETWEEN = 0.4, 0.4
SMALLEST_WIDTH, HEIGHT = 5.0, 4.2  # inches
ENTRIES_WITH_LEVEL_NAMES = 3
BAR_OPACITY = 0.75


def format_comparison(comparison: Comparison, lines: Sequence[dict]) -> str:
    """Everything a comparison has found so far, as Markdown.

    Args:
        comparison: which entries, modes, pairs and seeds there are.
        lines: of its finished runs; see `runs.comparison_results`.

    Returns:
        AP, AP50 and seconds by entry and mode; the differences from the baseline, paired by seed; the pairs.
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
        blocks += [f"AP minus AP {comparison.subtracted}, of the same seed:", differences_table]
    if comparison.pairs is not None:
        blocks += [
            f"AP {DISTILLED} minus AP {comparison.subtracted} of the same seed and student, and AP {DISTILLED}, by "
            "teacher and student:",
            format_pairs(comparison, lines),
        ]
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
            if mode == comparison.subtracted or not found:
                continue
            difference = spread(found)
            by_seed = ", ".join(f"{signed(value)} ({seed})" for seed, value in found.items())
            rows.append([name, mode, signed(difference.mean), by_seed, format_interval(difference)])
    columns = ["family", "mode", "difference", "each seed's (seed)", "95 % t-interval of the mean"]
    return markdown(columns, rows) if rows else ""


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
    """Draw the validation AP of every entry and pair: a bar a mode, as high as the mean, and a dot a seed.

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
    colours = {TEACHER: TEACHER_COLOUR} | {
        mode: RUN_COLOURS[index % len(RUN_COLOURS)]
        for index, mode in enumerate(dict.fromkeys([*comparison.modes, DISTILLED]))
    }
    middles = draw_bars(axes, groups, colours)
    turned = len(groups) > ENTRIES_WITH_LEVEL_NAMES
    axes.set_xticks(
        middles,
        list(map(written, groups)),
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
        fontsize=9,
    )
    axes.set_ylabel("validation AP")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: list(colours).index(labels[index]))
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
    )
    # without a library's version, the same results are drawn as the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})


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
    """Draw the groups side by side, each mode named once; where the middle of each group is."""
    left, middles, named = 0.0, [], set()
    for bars in groups.values():
        for index, (mode, found) in enumerate(bars.items()):
            label = None if mode in named else mode
            named.add(mode)
            axes.bar(left + index, 100 * found.mean, width=0.85, color=colours[mode], alpha=BAR_OPACITY, label=label)
            axes.scatter(
                [left + index] * len(found.by_seed),
                [100 * value for value in found.by_seed.values()],
                s=16,
                color="black",
                edgecolor="white",
                linewidth=0.5,
                zorder=3,
            )
        middles.append(left + (len(bars) - 1) / 2)
        left += len(bars) + INCHES_BETWEEN / INCHES_PER_BAR
    return middles
