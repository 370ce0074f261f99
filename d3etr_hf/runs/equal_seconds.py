"""How many steps a run takes in the seconds of another: by their paces, for a run has none before it has run."""

from collections.abc import Iterable, Mapping
from statistics import median

from d3etr_hf.runs.output_folder import CONFIGURATION, read_run_options
from d3etr_hf.runs.planned_run import PlannedRun
from d3etr_hf.runs.stopwatch import PROCESSOR_SECONDS, SECONDS_OF_CLOCK


def seconds_per_step(records: Iterable[Mapping]) -> float:
    """The median over runs of one kind, at least one, whose `seconds` took so many `steps`.

    On a machine that others use too the seconds of one run say little: the same run takes twice as long another time.
    """
    return median(record["seconds"] / record["steps"] for record in records)


def steps_in_equal_seconds(steps: int, pairs: Iterable[tuple[Mapping, Mapping]]) -> int:
    """How many steps take as long as `steps` of another kind of run, at least one.

    By the median over pairs of how many times as long a step takes: the two runs of a seed were on the same machine at
    about the same time, and what kept it busy counts in both. Where both know their `processor_seconds` those count,
    in which nothing else does.

    Args:
        steps: of the other kind.
        pairs: `seconds` and `steps` of a run of the other kind and of one of this, at least one pair.
    """
    return max(1, round(steps * median(_times_as_long(*pair) for pair in pairs)))


def _times_as_long(other: Mapping, own: Mapping) -> float:
    """A step of one run over a step of another."""
    measure = PROCESSOR_SECONDS if PROCESSOR_SECONDS in other and PROCESSOR_SECONDS in own else SECONDS_OF_CLOCK
    return (other[measure] / other["steps"]) / (own[measure] / own["steps"])


def options_in_full(run: PlannedRun, lines: Mapping[tuple, Mapping]) -> dict:
    """The options of a run that is about to start, its steps decided where that is left to the runs before it.

    A run that has been started keeps its length.

    Args:
        run: all that it needs is done.
        lines: of the results, by `PlannedRun.key`.
    """
    if not run.as_long_as:
        return run.options
    started = run.folder / CONFIGURATION
    if started.exists():
        return run.options | {"max_steps": read_run_options(started)["max_steps"]}
    steps = next(lines[other.key]["steps"] for other in run.as_long_as if other.seed == run.seed)
    pairs = zip(run.as_long_as, run.same_but_for_length, strict=True)
    return run.options | {
        "max_steps": steps_in_equal_seconds(steps, ((lines[other.key], lines[own.key]) for other, own in pairs))
    }
