"""The runs of a comparison: options, folder and fingerprint of each, in the order in which they start."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d3etr_hf.models.loading import ModelArguments, read_model_options
from d3etr_hf.runs.comparison import TEACHER, Comparison, Entry
from d3etr_hf.runs.output_folder import WITHOUT_EFFECT


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        entry: the entry's name.
        mode: the mode, or "teacher".
        seed: of the run.
        command: the command of `d3etr` that runs it: train or distill.
        options: all of that command's options.
        fingerprint: of the options and the teacher's; options that cannot change the result do not count.
        taught_by: the entry whose teacher teaches it; None without a teacher.
        waits_for: the run that trains its teacher; None without one.
        same_but_for_length: of a run that is to take another mode's seconds, the runs, one a seed, with its options
            but for the steps, which show its pace; else empty.
        as_long_as: those of that other mode, of the same seeds in the same order.
    """

    entry: str
    mode: str
    seed: int
    command: str
    options: dict
    fingerprint: str
    taught_by: str | None = None
    waits_for: "PlannedRun | None" = None
    same_but_for_length: "tuple[PlannedRun, ...]" = ()
    as_long_as: "tuple[PlannedRun, ...]" = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.entry} {self.mode} seed {self.seed}"

    @property
    def key(self) -> tuple[str, str, int, str]:
        """By which a line of the results knows its run."""
        return self.entry, self.mode, self.seed, self.fingerprint

    @property
    def needs(self) -> "tuple[PlannedRun, ...]":
        """The runs that have to be done before it starts."""
        teacher = () if self.waits_for is None else (self.waits_for,)
        return (*teacher, *self.same_but_for_length, *self.as_long_as)

    @property
    def folder(self) -> Path:
        """Its output folder. It bears the fingerprint: other options go elsewhere, and nothing is overwritten."""
        return Path(self.options["output_dir"])

    @property
    def configuration(self) -> Path:
        """Its options as a file. Beside the folder, which must be empty for a run to start in it."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


def plan(comparison: Comparison) -> list[PlannedRun]:
    """All runs of a comparison, each once.

    One seed after the other, so that an interrupted comparison has whole seeds; within a seed by entry, pairs last; a
    teacher before the first student that needs it. Runs that are to take the seconds of others come after all.

    Raises:
        DetectorLoadError: the file of a `model_config` cannot be read.
    """
    runs: list[PlannedRun] = []
    teachers: dict[tuple[str, int], PlannedRun] = {}
    students = comparison.students()
    taught = {entry.name for entry, mode in students if comparison.reads_teacher(entry, mode)}
    for seed in comparison.seeds:
        teacher_seed = seed if seed in comparison.teacher_seeds else comparison.teacher_seeds[0]
        for entry, mode in students:
            if comparison.equal_seconds(mode) is not None:
                continue
            key = (entry.teacher_entry, teacher_seed)
            if entry.name in taught and isinstance(entry.teacher, dict) and key not in teachers:
                teachers[key] = _teacher_run(comparison, *key)
                runs.append(teachers[key])
            runs.append(_student_run(comparison, entry, mode, seed, teachers.get(key)))
    timed = [(entry, mode) for entry, mode in students if comparison.equal_seconds(mode) is not None]
    return runs + [_run_of_equal_seconds(comparison, *each, seed, runs) for seed in comparison.seeds for each in timed]


def _teacher_run(comparison: Comparison, name: str, seed: int) -> PlannedRun:
    options = comparison.teacher_options(name) | {"seed": seed}
    mark = fingerprint(options)
    folder = Path(comparison.output_dir) / name / f"{TEACHER}_seed_{seed}_{mark}"
    return PlannedRun(name, TEACHER, seed, "train", options | {"output_dir": str(folder)}, mark)


def _student_run(comparison: Comparison, entry: Entry, mode: str, seed: int, trained: PlannedRun | None) -> PlannedRun:
    """Args: trained: the run that trains the entry's teacher, if one does."""
    options = comparison.student_options(entry, mode) | {"seed": seed}
    taught_by = entry.teacher_entry if comparison.reads_teacher(entry, mode) else None
    waits_for = trained if taught_by is not None else None
    source = None
    if taught_by is not None:
        # its folder may be elsewhere another time; what it was trained with may not
        source = entry.teacher if waits_for is None else waits_for.fingerprint
        options["teacher"] = entry.teacher if waits_for is None else str(waits_for.folder)
    mark = fingerprint(options | {"teacher": source})
    pair = f"_from_{entry.teacher_entry}" if entry.student_entry else ""
    folder = Path(comparison.output_dir) / (entry.student_entry or entry.name) / f"{mode}{pair}_seed_{seed}_{mark}"
    options["output_dir"] = str(folder)
    return PlannedRun(entry.name, mode, seed, "distill", options, mark, taught_by, waits_for)


def _run_of_equal_seconds(
    comparison: Comparison, entry: Entry, mode: str, seed: int, planned: Sequence[PlannedRun]
) -> PlannedRun:
    """A run that is to take the seconds of others; its steps are decided when those are done.

    Its fingerprint is of what decides them and not of what they come to: it keeps its place when more seeds are run.
    """
    equal = comparison.equal_seconds(mode)
    same, other = (
        {run.seed: run for run in planned if (run.entry, run.mode) == (entry.name, name)}
        for name in (equal.same_as, equal.other)
    )
    model = same[seed]
    mark = fingerprint({"same_as": model.fingerprint, "equal_seconds_with": other[seed].fingerprint})
    folder = model.folder.with_name(f"{mode}_seed_{seed}_{mark}")
    return replace(
        model,
        mode=mode,
        options=model.options | {"output_dir": str(folder)},
        fingerprint=mark,
        same_but_for_length=tuple(same.values()),
        as_long_as=tuple(other[each] for each in same),
    )


def fingerprint(options: dict) -> str:
    """Twelve hexadecimal digits that change with every option that may change a run's result.

    A model's configuration counts by what its file holds.
    """
    counted = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
    if isinstance(counted.get("model_config"), str):
        counted["model_config"] = read_model_options(ModelArguments(model_config=counted["model_config"]))
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:12]
