"""What the lines of a comparison say of an entry and a mode: values by seed, means, and paired differences."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from d3etr_hf.runs.comparison import OF_PAIR, TEACHER

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """One value a seed.

    Attributes:
        by_seed: the values, at least one.
        mean: of them.
        deviation: their standard deviation (n - 1); None of one value.
        interval: low and high end of the 95 % t-interval of the mean; None of one value.
    """

    by_seed: dict[int, float]
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None


def spread(by_seed: Mapping[int, float]) -> Spread:
    """Mean, deviation and interval of at least one value."""
    values = np.array(list(by_seed.values()))
    mean = float(values.mean())
    if len(values) == 1:
        return Spread(dict(by_seed), mean, None, None)
    deviation = float(values.std(ddof=1))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return Spread(dict(by_seed), mean, deviation, (mean - reach, mean + reach))


def values_of(lines: Iterable[Mapping], entry: str, mode: str, measure: str = "AP") -> dict[int, float]:
    """A measure of an entry's runs in a mode, by seed, in the seeds' order."""
    found = {
        line["seed"]: line[measure]
        for line in lines
        if (line["family"], line["mode"]) == (entry, mode) and measure in line
    }
    return dict(sorted(found.items()))


def differing_inputs(lines: Iterable[Mapping], teacher_of_each_seed: bool) -> list[str]:
    """What runs that a table sets beside each other have read otherwise, in words; nothing where all is well.

    The validation split must be the same for all runs of a student, the teacher for all of an entry, or of each of its
    seeds, and all else for all of a mode, which may set it. Lines without `inputs` say nothing.

    Args:
        lines: of finished runs.
        teacher_of_each_seed: whether every seed has a teacher of its own.
    """
    marks: dict[tuple[str, str], set[str]] = {}
    students = [line for line in lines if line["mode"] != TEACHER]
    for line in students:
        for name, mark in line.get("inputs", {}).items():
            if name.startswith("validation"):
                place = line["family"].rpartition(OF_PAIR)[-1]
            elif name == "teacher":
                place = line["family"] + (f" seed {line['seed']}" if teacher_of_each_seed else "")
            else:
                place = f"{line['family']} {line['mode']}"
            marks.setdefault((place, name), set()).add(mark)
    return [f"{place}: the {name}" for (place, name), found in marks.items() if len(found) > 1]


def devices_of(lines: Iterable[Mapping]) -> dict[str, int]:
    """How many runs were on each device and number of threads, the most first."""
    found = Counter(f"{line['device']}, threads: {line['threads']}" for line in lines if "device" in line)
    return dict(found.most_common())


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Value minus baseline of the same seed, for the seeds that have both."""
    return {seed: value - baseline[seed] for seed, value in values.items() if seed in baseline}
