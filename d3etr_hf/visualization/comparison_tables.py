"""A comparison of runs as Markdown tables."""

from collections.abc import Iterable, Sequence

from d3etr_hf.runs.comparison import DISTILLED, TEACHER, Comparison, Entry
from d3etr_hf.runs.comparison_statistics import (
    Spread,
    devices_of,
    differences,
    differing_inputs,
    spread,
    values_of,
)
from d3etr_hf.runs.equal_seconds import seconds_per_step

MISSING = "—"
MOST_COLUMNS = 6  # of modes; of more there is a row each
# what the row of a mode shows: multiplied by what, with how many decimals
BY_MODE = {"AP": (100, 1), "AP50": (100, 1), "steps": (1, 0)}


def format_comparison(comparison: Comparison, lines: Sequence[dict]) -> str:
    """Everything a comparison has found so far, as Markdown.

    Args:
        comparison: which entries, modes, pairs and seeds there are.
        lines: of its finished runs; see `runs.comparison_results`.

    Returns:
        AP, AP50, steps and seconds by entry and mode, of many modes in one table; the differences from the baseline,
        paired by seed, and from modes that were given the same seconds; the pairs.
    """
    seeds = ", ".join(map(str, comparison.seeds))
    over_seeds = f"mean ± standard deviation over seeds {seeds}" if len(comparison.seeds) > 1 else f"seed {seeds}"
    lengths = []
    if len(comparison.modes) > MOST_COLUMNS:
        title = f"AP and AP50 (0..100) and steps, {over_seeds}, and the median time of a step:"
        blocks = [title, format_by_mode(comparison, lines)]
    else:
        blocks = [
            f"AP (0..100), {over_seeds}:",
            format_values(comparison, lines, "AP", 100, 1),
            f"AP50 (0..100), {over_seeds}:",
            format_values(comparison, lines, "AP50", 100, 1),
        ]
        if any(map(comparison.equal_seconds, comparison.modes)):
            lengths += ["Steps of training:", format_values(comparison, lines, "steps", 1, 0)]
        lengths += ["Seconds of training:", format_values(comparison, lines, "seconds", 1, 0)]
    if differences_table := format_differences(comparison, lines):
        at = ", at equal steps" if steps_are_equal(comparison, lines) else ""
        blocks += [f"AP minus AP {comparison.subtracted}, of the same seed{at}:", differences_table]
    if at_equal_seconds := format_equal_seconds(comparison, lines):
        blocks += [
            "At equal seconds, AP minus AP of the same seed; a mode that takes the seconds of another has as many "
            "steps as fit by the median over seeds of how many times as long a step of that other takes, on a CPU in "
            "the processor's own time:",
            at_equal_seconds,
        ]
    if comparison.pairs is not None:
        blocks += [
            f"AP {DISTILLED} minus AP {comparison.subtracted} of the same seed and student, and AP {DISTILLED}, by "
            "teacher and student:",
            format_pairs(comparison, lines),
        ]
    return "\n\n".join([*notes_of(comparison, lines), *blocks, *lengths]) + "\n"


def notes_of(comparison: Comparison, lines: Sequence[dict]) -> list[str]:
    """What keeps runs from being compared: other data or models than one another's, other machines."""
    notes = []
    if differing := differing_inputs(lines, teacher_of_each_seed=len(comparison.teacher_seeds) > 1):
        notes.append(
            f"**Not comparable**: the runs of some rows have read different data or models ({'; '.join(differing)}). "
            "Remove the folders of those that have not read what is there now, and call d3etr compare again."
        )
    if len(devices := devices_of(lines)) > 1:
        named = "; ".join(f"{count} on {device}" for device, count in devices.items())
        notes.append(f"Seconds are of different machines, and not comparable throughout: {named}.")
    return notes


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


def format_by_mode(comparison: Comparison, lines: Sequence[dict]) -> str:
    """A Markdown table of all measures at once: a row an entry and mode, of those that have a run."""
    rows = []
    for name in comparison.entries:
        for column, expected in columns_of(comparison, comparison.entry(name)):
            found = [line for line in lines if (line["family"], line["mode"]) == column]
            if not found:
                continue
            cells = [
                format_spread(values_of(found, *column, measure), *form, expected=len(found))
                for measure, form in BY_MODE.items()
            ]
            pace = f"{1000 * seconds_per_step(found):.0f}" if all("steps" in line for line in found) else MISSING
            seeds = str(len(found)) if len(found) == expected else f"{len(found)} of {expected}"
            rows.append([name, column[1], f"{max(line['parameters'] for line in found):,}", seeds, *cells, pace])
    return markdown(["family", "mode", "parameters", "seeds", *BY_MODE, "ms a step"], rows)


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
    """A Markdown table of teachers × students: the distilled student's gain, and its AP with the same seeds."""
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
            gain, ap = spread(gains), spread({seed: values[seed] for seed in gains})
            part = f", {len(gains)} of {len(comparison.seeds)} seeds" if len(gains) < len(comparison.seeds) else ""
            deviation = "" if gain.deviation is None else f" ± {100 * gain.deviation:.1f}"
            cells.append(f"{signed(gain.mean)}{deviation} (AP {100 * ap.mean:.1f}{part})")
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
