"""Compare students alone, distilled and otherwise, over detector families and seeds: a matrix of runs from one file.

    d3etr compare configs/families/shapes.yaml           # two runs at a time, until all are done
    d3etr compare configs/families/shapes.yaml --list    # what would run, and what is done
    d3etr compare configs/families/shapes.yaml --report  # the table and the pictures of what is done

Of runs that are evaluated on their way (eval_strategy: steps) there are curves too: AP over steps, and over seconds.
Where entries differ in nothing but the length of their runs, there are such curves of what each length comes to.

Stopped, it goes on where it was when it is called again with the same file; runs whose options have changed are run
again, beside the old ones. A run that fails is run again by the next call.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from d3etr_hf.cli import distill, train
from d3etr_hf.cli.command_line import build_arguments, parse_arguments
from d3etr_hf.configurations import option, write_yaml
from d3etr_hf.data import DataArguments, check_places
from d3etr_hf.errors import CommandLineError, ComparisonError, UnsupportedOptionError
from d3etr_hf.files import make_folder, write_errors, write_whole
from d3etr_hf.models.loading import (
    ModelArguments,
    TeacherArguments,
    check_model_options,
    family_of_checkpoint,
    read_model_options,
)
from d3etr_hf.runs.comparison import DISTILLED, Comparison
from d3etr_hf.runs.comparison_results import is_finished, key_of, line_of, lines_of, read_lines, record
from d3etr_hf.runs.equal_seconds import options_in_full
from d3etr_hf.runs.folder_lock import holding
from d3etr_hf.runs.inputs import InputsNow, identity_of
from d3etr_hf.runs.planned_run import PlannedRun, plan
from d3etr_hf.runs.run_pool import Job, run_jobs
from d3etr_hf.training.checkpoints import checkpoints_of, was_saved
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.unlabeled import check_unlabeled_option
from d3etr_hf.visualization.comparison import draw_comparison
from d3etr_hf.visualization.comparison_curves import draw_budgets, draw_curves
from d3etr_hf.visualization.comparison_tables import format_comparison

# the fields that say where data are
OF_DATA = {"data_folder", "dataset_name", "train_annotations", "train_images", "val_annotations", "val_images"}
# beside the results, by their name; curves also by the entry's, of runs that were evaluated on their way
TABLE, PICTURE, CURVES, BUDGETS = ".md", ".png", "{}_{}_curves.png", "{}_budgets.png"


@dataclass
class CompareArguments:
    """What to do instead of running."""

    list: bool = option(False, "Print what would run and what is done, and run nothing.")
    report: bool = option(False, "Write table and pictures of the results there are, and run nothing.")


def main() -> None:
    """What `d3etr compare` runs."""
    comparison, arguments = parse_arguments((Comparison, CompareArguments), description=__doc__, adjust=narrow)
    runs = plan(comparison)
    if arguments.list:
        print(list_runs(runs, read_lines(Path(comparison.results))))
    elif arguments.report:
        print(report(comparison, runs))
    else:
        # the file comes first, unless everything was given by flags
        check_runs(runs, "command line" if sys.argv[1].startswith("-") else sys.argv[1])
        print(compare(comparison, runs))


def narrow(of_file: dict, flags: dict) -> None:
    """Leave out of a file what it says of other modes than the flags name; in the file alone that is a mistake."""
    if "modes" not in flags:
        return
    named = of_file.get("mode_options", {})
    used = {*flags["modes"], DISTILLED} if (of_file | flags).get("pairs") else {*flags["modes"]}
    of_file["mode_options"] = {mode: options for mode, options in named.items() if mode in used}
    if of_file.get("baseline") not in flags["modes"]:
        of_file.pop("baseline", None)


def compare(comparison: Comparison, runs: Sequence[PlannedRun]) -> str:
    """Run what is not done yet, recording each result as it arrives; the report.

    Raises:
        FolderInUseError: another call is at work on these runs.
        ComparisonError: some runs failed, and the others are done; or see `refuse_changed_inputs` and `read_lines`.
        WriteError: there is no place for the results.
    """
    results = Path(comparison.results)
    with holding(Path(comparison.output_dir), "another d3etr compare") as descriptor:
        refuse_changed_inputs(runs)
        make_folder(results.parent)  # before runs take hours
        read_lines(results)
        finished = [run for run in runs if is_finished(run)]
        for run in finished:
            # a call that was stopped between a run's end and the writing of its line
            if run.key not in lines_of(runs, read_lines(results)):
                record(results, line_of(run))
        to_do = {run.name: run for run in runs if run not in finished}
        tell_of_replacements(list(to_do.values()), comparison)

        def finish(job: Job) -> None:
            line = line_of(to_do[job.name])
            record(results, line)
            tqdm.write(f"{job.name}: AP {100 * line['AP']:.1f}, {line['seconds']:.0f} s", file=sys.stderr)
            report(comparison, runs)

        def begin(job: Job) -> None:
            run = to_do[job.name]
            make_folder(run.configuration.parent)
            options = options_in_full(run, lines_of(runs, read_lines(results)))
            write_whole(run.configuration, write_yaml(options))

        failures = run_jobs([job_of(run) for run in to_do.values()], comparison.workers, finish, descriptor, begin)
    if failures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        raise ComparisonError(
            f"{len(failures)} of {len(runs)} runs failed, and the same call tries them again; the others are done:\n"
            f"{reasons}"
        )
    return report(comparison, runs)


def tell_of_replacements(to_do: Sequence[PlannedRun], comparison: Comparison) -> None:
    """Say how many runs have a line of results already and no folder, as after a move to another machine."""
    if again := lines_of(to_do, read_lines(Path(comparison.results))):
        tqdm.write(
            f"{len(again)} of the {len(to_do)} runs to do have results in {comparison.results}, but no folder in "
            f"{comparison.output_dir} any more: they are run again, and their results replaced; --modes and --seeds "
            "leave runs out",
            file=sys.stderr,
        )


def job_of(run: PlannedRun) -> Job:
    """The command that starts a run or goes on with it."""
    command = [sys.executable, "-m", "d3etr_hf.cli.main", run.command, str(run.configuration)]
    return Job(run.name, command, run.log, tuple(needed.name for needed in run.needs))


def check_runs(runs: Sequence[PlannedRun], source: str) -> None:
    """Refuse what would fail once it runs: options, model configurations, checkpoints of teachers, data folders.

    Args:
        source: the file, as errors call it.

    Raises:
        CommandLineError: an option is unknown, of the wrong type, out of its range, or contradicts another.
        DetectorLoadError: a model configuration, or a teacher's checkpoint, cannot be used.
        DatasetError: the data are not there.
        UnsupportedOptionError: nothing would be learned from images without labels.
    """
    checked: set[str] = set()
    for run in runs:
        place = f"{source}: {run.name}"
        arguments = arguments_of(run, place)
        if run.command == "train":
            try:
                train.without_distillation(arguments[D3etrTrainingArguments])
            except CommandLineError as error:
                raise CommandLineError(f"{place}: {error}; give them to students or modes only") from None
        model = arguments[ModelArguments]
        if model.model_config is not None:
            check_model_options(read_model_options(model), f"{place}: model_config")
        checkpoints = {"model": model.model}
        if TeacherArguments in arguments and run.waits_for is None:
            checkpoints["teacher"] = arguments[TeacherArguments].teacher
        for role, path in checkpoints.items():
            if path is not None and path not in checked:
                family_of_checkpoint(path, f"{place}: {role}")
                checked.add(path)
        data = arguments[DataArguments]
        training = arguments[D3etrTrainingArguments]
        try:
            check_unlabeled_option(data.unlabeled_images, training, run.options.get("teacher"))
        except UnsupportedOptionError as error:
            remedy = "" if "teacher" in run.options else ", or give it to modes with a teacher alone, in mode_options"
            raise UnsupportedOptionError(f"{place}: {error}{remedy}") from None
        where = repr([getattr(data, name) for name in sorted(OF_DATA)])
        if where not in checked:
            check_places(data)
            checked.add(where)


def arguments_of(run: PlannedRun, place: str) -> dict[type, Any]:
    """What a run's command is called with, by type; `place` is what errors call it."""
    types = {"train": train.TYPES, "distill": distill.TYPES}[run.command]
    return dict(zip(types, build_arguments(types, run.options, place), strict=True))


def refuse_changed_inputs(runs: Sequence[PlannedRun]) -> None:
    """Refuse runs that are done and have read other annotations or models than there are now.

    They would stand in a table beside those that are still to run. Images are not looked at, nor models that are gone.

    Raises:
        ComparisonError: there are such; the message names all.
        DatasetError: the data cannot be loaded.
    """
    inputs_now = InputsNow()
    changed: dict[str, list[str]] = {}
    for run in filter(is_finished, runs):
        if not (before := identity_of(run.folder)):
            continue
        arguments = arguments_of(run, run.name)
        teacher = arguments.get(TeacherArguments, TeacherArguments())
        now = inputs_now.identity(arguments[ModelArguments], teacher, arguments[DataArguments])
        for name in sorted(now.keys() & before.keys()):
            if now[name] != before[name]:
                changed.setdefault(f"the {name}", []).append(str(run.folder))
    if changed:
        raise ComparisonError(
            "; ".join(
                f"{name} changed after these runs were done: {', '.join(folders)}" for name, folders in changed.items()
            )
            + ". Put back what was there, or remove these folders and call again, which runs them anew"
        )


def list_runs(runs: Sequence[PlannedRun], lines: Sequence[dict]) -> str:
    """A line a run in the order in which they start, with its state."""
    found = lines_of(runs, lines)
    states = {run: state_of(run) for run in runs}
    wide = max(map(len, states.values()))
    text = [
        f"{state:<{wide}}  {run.name}" + (f"  AP {100 * found[run.key]['AP']:.1f}" if run.key in found else "")
        for run, state in states.items()
    ]
    done = list(states.values()).count("done")
    return "\n".join([*text, f"{done} of {len(runs)} runs are done"])


def state_of(run: PlannedRun) -> str:
    """Whether a run is done, and else where it would start."""
    if is_finished(run):
        return "done"
    checkpoint = next(filter(was_saved, checkpoints_of(run.folder)), None)
    return "to run" if checkpoint is None else f"to go on from {checkpoint.name}"


def report(comparison: Comparison, runs: Sequence[PlannedRun]) -> str:
    """Write the table and the pictures beside the results; the table, and where they are.

    Raises:
        ComparisonError: no run is finished.
        WriteError: a file cannot be written.
    """
    results = Path(comparison.results)
    everything = read_lines(results)
    lines = list(lines_of(runs, everything).values())
    if not lines:
        raise ComparisonError(f"{results} holds no result of these runs: call d3etr compare without --report first")
    text = format_comparison(comparison, lines)
    write_whole(results.with_suffix(TABLE), text)
    with write_errors(results.with_suffix(PICTURE)):
        pictures = draw(comparison, lines, results)
    others = len({key_of(line) for line in everything}) - len(lines)
    note = f"; {others} lines of {results} are of other options or seeds, and left out" if others else ""
    files = ", ".join(map(str, [results.with_suffix(TABLE), *pictures]))
    return f"{text}\n{len(lines)} of {len(runs)} runs: {files}{note}"


def draw(comparison: Comparison, lines: Sequence[dict], results: Path) -> list[Path]:
    """Draw what there is to draw of finished runs, at least one; the pictures, beside the results."""
    pictures = [results.with_suffix(PICTURE)]
    draw_comparison(comparison, lines, pictures[0])
    for entry in comparison.entries:
        path = results.with_name(CURVES.format(results.stem, entry))
        if draw_curves(comparison, lines, entry, path):
            pictures.append(path)
    budgets = results.with_name(BUDGETS.format(results.stem))
    if draw_budgets(comparison, lines, budgets):
        pictures.append(budgets)
    return pictures
