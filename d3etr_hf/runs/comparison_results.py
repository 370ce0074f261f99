"""The results of a comparison: a file with one JSON line for each finished run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from d3etr_hf.errors import ComparisonError, one_line
from d3etr_hf.files import make_folder, write_errors, write_whole
from d3etr_hf.runs.inputs import identity_of
from d3etr_hf.runs.output_folder import ENVIRONMENT, HISTORY, RESULTS, read_record
from d3etr_hf.runs.planned_run import PlannedRun
from d3etr_hf.runs.stopwatch import PROCESSOR_SECONDS

logger = logging.get_logger(__name__)

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def line_of(run: PlannedRun) -> dict:
    """What a finished run came to.

    Returns:
        `family` (the entry), `mode`, `seed`, `teacher` (the entry that taught it, or None), AP and the like (0..1),
        `parameters`, `steps`, `seconds` of training, `device`, `threads`, `inputs` (`inputs.identity_of`) and
        `fingerprint`; of a run on the CPU `processor_seconds`, and of one that was evaluated on its way `evaluations`,
        pairs of step and AP.

    Raises:
        ComparisonError: the run has no results, or they hold no AP.
        DamagedFileError: its results cannot be read.
    """
    try:
        results, environment = read_record(run.folder / RESULTS), read_record(run.folder / ENVIRONMENT)
    except FileNotFoundError as error:
        raise ComparisonError(f"{run.name}: it ended and left no {error.filename}; see its log {run.log}") from None
    if "AP" not in results:
        raise ComparisonError(f"{run.name}: {run.folder / RESULTS} holds no AP: the validation split has no object")
    line = {"family": run.entry, "mode": run.mode, "seed": run.seed, "teacher": run.taught_by}
    line |= {name: results[name] for name in METRICS if name in results}
    line |= {name: results[name] for name in ("parameters", "steps", "seconds")}
    if PROCESSOR_SECONDS in results:
        line[PROCESSOR_SECONDS] = results[PROCESSOR_SECONDS]
    line |= {name: environment[name] for name in ("device", "threads")}
    history = run.folder / HISTORY
    evaluations = evaluations_of(read_record(history)) if history.exists() else []
    if len(evaluations) > 1:
        line["evaluations"] = evaluations
    line["inputs"] = identity_of(run.folder)
    return line | {"fingerprint": run.fingerprint}


def evaluations_of(history: Sequence[dict]) -> list[tuple[int, float]]:
    """Step and AP (0..1) of each evaluation that a run has logged.

    Of two at one step it is the first, of the weights at that step: those of the best evaluation may come after.
    """
    found: dict[int, float] = {}
    for entry in history:
        if "eval_AP" in entry:
            found.setdefault(entry["step"], entry["eval_AP"])
    return list(found.items())


def key_of(line: dict) -> tuple[str, str, int, str]:
    """By which a line knows its run; see `PlannedRun.key`."""
    return line["family"], line["mode"], line["seed"], line["fingerprint"]


def read_lines(path: Path) -> list[dict]:
    """The lines of a results file; none if it is not there.

    A last line that was cut off while it was written is passed over with a warning: its run has its own results.

    Raises:
        ComparisonError: it cannot be read, or a line is no result.
    """
    if not path.exists():
        return []
    lines: list[dict] = []
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ComparisonError(
            f"{path}: cannot be read as results of d3etr compare ({one_line(error)}): move it away, or name another "
            "file as results; runs that are done are written into it again"
        ) from error
    for number, text in enumerate(texts, start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
            hash(key_of(line))
            if not all(isinstance(line[name], int | float) for name in ("AP", "parameters")):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number == len(texts):  # no newline ends it
                logger.warning(f"{path}: line {number} was cut off while it was written and is passed over")
                continue
            raise ComparisonError(f"{path}: line {number} is no result of d3etr compare: remove it") from None
        lines.append(line)
    return lines


def record(path: Path, line: dict) -> None:
    """Add a line to a results file, in one write that is on the disk when this returns.

    A line of the same run gives way to it, and so does one that was cut off: the file is then written anew.

    Raises:
        ComparisonError: see `read_lines`.
        WriteError: it cannot be written.
    """
    make_folder(path.parent)
    lines, text = read_lines(path), f"{json.dumps(line)}\n"
    others = [other for other in lines if key_of(other) != key_of(line)]
    whole = not path.exists() or path.read_bytes().endswith(b"\n") or path.stat().st_size == 0
    if len(others) < len(lines) or not whole:
        write_whole(path, "".join(f"{json.dumps(other)}\n" for other in others) + text)
        return
    with write_errors(path), path.open("ab", buffering=0) as file:
        file.write(text.encode())
        os.fsync(file.fileno())


def lines_of(runs: Sequence[PlannedRun], lines: Sequence[dict]) -> dict[tuple, dict]:
    """The lines that belong to these runs as they are planned now, by `PlannedRun.key`."""
    by_key = {key_of(line): line for line in lines}
    return {run.key: by_key[run.key] for run in runs if run.key in by_key}


def is_finished(run: PlannedRun) -> bool:
    """Whether a run's folder holds its results."""
    return (run.folder / RESULTS).exists()
