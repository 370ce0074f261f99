"""The output folder of a run: whose it is, what it holds, and where to go on from."""

import os
from pathlib import Path
from typing import Any

from d3etr_hf.configurations import read_yaml, read_yaml_file
from d3etr_hf.errors import CheckpointError, DamagedFileError, OutputFolderError, quoted
from d3etr_hf.files import UNFINISHED, read_json
from d3etr_hf.runs.folder_lock import LOCK
from d3etr_hf.runs.longer_run import OF_LENGTH, is_longer, refuse_planned_length
from d3etr_hf.training.checkpoints import (
    check_whole,
    checkpoints_of,
    newest_whole_checkpoint,
    put_aside,
    was_saved,
)
from d3etr_hf.training.training_arguments import RENAMED_OPTIONS, D3etrTrainingArguments

CONFIGURATION, LAUNCH, ENVIRONMENT = "run.yaml", "launch.json", "environment.json"
INPUTS = "inputs.json"
RESULTS, HISTORY, SECONDS = "results.json", "log_history.json", "seconds.json"
# how a run goes on without one of its files, when it is damaged
REMEDIES = {
    LAUNCH: "remove it, and start the run on as many processes and in the same precision as before",
    ENVIRONMENT: "remove it, and what it says of versions and devices is left out",
    RESULTS: "remove it and call the run again, which goes on from its last checkpoint",
    INPUTS: "remove it, and what the run reads is not compared with what it read before",
    HISTORY: "remove it and results.json and call the run again, which writes both from its last checkpoint",
    SECONDS: "remove it, and the seconds of training are counted from zero",
}
# fields of a run that may differ when it goes on: they cannot change what is learned
WITHOUT_EFFECT = {
    "output_dir",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataset_workers",
    "allow_images_elsewhere",
    "hash_images",
    "disable_tqdm",
    "probe",
    "report_to",
    "run_name",
    "save_total_limit",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "use_cpu",
    "resume_from_checkpoint",
}
# where a run reads from; while it is under way what it reads is known by content, and a copy elsewhere is the same
PLACES = {
    "data_folder",
    "train_annotations",
    "train_images",
    "val_annotations",
    "val_images",
    "unlabeled_images",
    "teacher",
    "model",
    "backbone_weights",
    "teacher_cache",
}


def refuse_split_launch(training_arguments: D3etrTrainingArguments) -> None:
    """Refuse processes that were started together and do not know of each other: each would write the same folder.

    Raises:
        OutputFolderError: the launcher's number of processes is not the one that the arguments see.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != training_arguments.world_size:
        raise OutputFolderError(
            f"{launched} processes were launched, but each sees {training_arguments.world_size}: on a CPU add "
            "--use_cpu true, else start one process a GPU"
        )


def describe_launch(training_arguments: D3etrTrainingArguments) -> dict:
    """What the launcher decides: number of processes and precision."""
    return {
        "processes": training_arguments.world_size,
        "mixed_precision": training_arguments.mixed_precision or "no",
    }


def check_output_folder(output: Path, configuration: str, launch: dict) -> bool:
    """Make sure that an output folder is this run's, or free.

    Args:
        output: the folder, which need not exist.
        configuration: of the run, from `describe_run`; fields that cannot change its result do not count.
        launch: number of processes and precision, which the launcher decides.

    Returns:
        Whether it is this run's but for a longer training.

    Raises:
        OutputFolderError: it is a file or cannot be read, or holds another run, one of an earlier version, or files
            but no run.
        DamagedFileError: what it holds of a run cannot be read.
    """
    try:
        names = {path.name for path in output.iterdir() if path.suffix != UNFINISHED} - {LOCK}
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputFolderError(
            f"{output} cannot be used as a folder ({error.strerror}): choose another output_dir"
        ) from None
    if not names:
        return False
    if CONFIGURATION not in names:
        raise OutputFolderError(
            f"{output} is not empty and holds no {CONFIGURATION} of a run: choose another output_dir, or empty it"
        )
    if RESULTS not in names and not any(map(was_saved, [*checkpoints_of(output), *put_aside(output)])):
        return False  # it stopped before it had saved anything: nothing is lost by another configuration
    old, new = read_run_options(output / CONFIGURATION), read_yaml(configuration) or {}
    if RESULTS not in names and INPUTS in names:
        # what is there is compared before the run goes on
        old, new = _without_places(old), _without_places(new)
    _refuse_renamed_options(output / CONFIGURATION, old)
    if LAUNCH in names:
        old, new = old | read_record(output / LAUNCH), new | launch
    return _refuse_changed_options(output, old, new)


def _without_places(options: dict) -> dict:
    """Options with the mere fact that a place is named."""
    return {name: name if name in PLACES else value for name, value in options.items()}


def read_run_options(path: Path) -> dict:
    """The options that a run's `run.yaml` sets, by name.

    Raises:
        DamagedFileError: it is cut off, empty, or holds no options.
    """
    try:
        values = read_yaml_file(path)
        reason = "it holds no options"
    except ValueError as error:
        values, reason = None, str(error)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DamagedFileError(
            f"{path} is damaged ({reason}), and without it nobody can tell which run the folder holds: choose another "
            "output_dir, or empty this one"
        )
    return values


def _refuse_changed_options(output: Path, old: dict, new: dict) -> bool:
    """Whether it is the same run for a longer time."""
    keys = sorted((old.keys() | new.keys()) - WITHOUT_EFFECT)
    changed = [key for key in keys if old.get(key) != new.get(key)]
    if is_longer(old, new, changed):
        refuse_planned_length(output, old, new, changed)
        return True
    if not changed:
        return False
    remedy = "choose another output_dir, or remove the folder"
    if set(changed) <= OF_LENGTH:
        remedy += (
            f"; to train its model for more steps, begin another run with its weights: --model {output} --output_dir "
            "ANOTHER_FOLDER (in place of model_config)"
        )
    raise OutputFolderError(
        f"{output} holds another run: it differs in "
        + ", ".join(
            f"{key} ({old.get(key, 'default')!r} there, {new.get(key, 'default')!r} here)" for key in changed[:3]
        )
        + f"; {remedy}"
    )


def _refuse_renamed_options(path: Path, values: dict) -> None:
    known = D3etrTrainingArguments.__dataclass_fields__
    renamed = {name: RENAMED_OPTIONS[name] for name in values if name in RENAMED_OPTIONS and name not in known}
    if renamed:
        names = ", ".join(f"{old!r} is called {new!r} now" for old, new in renamed.items())
        raise OutputFolderError(
            f"{path} is of an earlier version: {names}; rename it in that file to go on, or choose another output_dir"
        )


def refuse_to_resume_finished(output: Path, training_arguments: D3etrTrainingArguments) -> None:
    """Raises: OutputFolderError: a checkpoint is named, and the run is finished: there is nothing to go on with."""
    asked = training_arguments.resume_from_checkpoint
    if asked is not None:
        raise OutputFolderError(
            f"resume_from_checkpoint={quoted(asked)}: {output} holds this run finished; leave the option out for its "
            f"results, or start another run from these weights: --model {asked} --output_dir ANOTHER_FOLDER"
        )


def checkpoint_to_go_on_from(output: Path, training_arguments: D3etrTrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names, or else the newest that is whole.

    Returns:
        None to start from the beginning.

    Raises:
        CheckpointError: the one that is named is not there, not whole or of another folder; or none is whole any more.
    """
    asked, with_best = training_arguments.resume_from_checkpoint, training_arguments.load_best_model_at_end
    if asked is None:
        newest = newest_whole_checkpoint(output, with_best)
        return None if newest is None else str(newest)
    check_whole(Path(asked), with_best=with_best)
    if Path(asked).resolve().parent != output.resolve():
        raise CheckpointError(
            f"resume_from_checkpoint={asked} is not in {output}, and a run goes on from its own checkpoints only: to "
            f"start another from its weights, --model {asked}"
        )
    return asked


def read_record(path: Path) -> Any:
    """What a run wrote into one of its JSON files.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFileError: it cannot be read; the message says how to do without.
    """
    remedy = REMEDIES.get(path.name, "remove it, and the same call makes it anew")
    content = read_json(path, remedy)
    if path.name in REMEDIES and not isinstance(content, list if path.name == HISTORY else dict):
        raise DamagedFileError(f"{path} is damaged, since it holds {quoted(content)}: {remedy}")
    return content
