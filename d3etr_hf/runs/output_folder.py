"""The output folder of a run: whose it is, what it holds, and where to go on from."""

import json
import os
from pathlib import Path

from transformers.utils import logging

from d3etr_hf.configurations import read_yaml
from d3etr_hf.errors import OutputFolderError
from d3etr_hf.training.training_arguments import RENAMED_OPTIONS, D3etrTrainingArguments

logger = logging.get_logger(__name__)

CONFIGURATION, LAUNCH, ENVIRONMENT = "run.yaml", "launch.json", "environment.json"
RESULTS, HISTORY, SECONDS = "results.json", "log_history.json", "seconds.json"
# fields of a run that may differ when it goes on: they cannot change what is learned
WITHOUT_EFFECT = {
    "output_dir",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataset_workers",
    "disable_tqdm",
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


def check_output_folder(output: Path, configuration: str, launch: dict) -> str | None:
    """Make sure an output folder is this run's, or free, and find where to go on from.

    Args:
        output: the folder, which need not exist.
        configuration: of the run, from `describe_run`; fields that cannot change its result do not count.
        launch: number of processes and precision, which the launcher decides.

    Returns:
        The last complete checkpoint, or None to start from the beginning.

    Raises:
        OutputFolderError: the folder holds another run, one of an earlier version, or files but no run.
    """
    if not output.exists() or not any(output.iterdir()):
        return None
    if not (output / CONFIGURATION).exists():
        raise OutputFolderError(
            f"{output} is not empty and holds no {CONFIGURATION} of a run: choose another output_dir, or empty it"
        )
    recorded = (output / CONFIGURATION).read_text(encoding="utf-8")
    old, new = (read_yaml(text) or {} for text in (recorded, configuration))
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is None and not (output / RESULTS).exists():
        return None  # it stopped before it had saved anything: nothing is lost by another configuration
    _refuse_renamed_options(output / CONFIGURATION, old)
    if (output / LAUNCH).exists():
        old, new = old | json.loads((output / LAUNCH).read_text()), new | launch
    keys = sorted((old.keys() | new.keys()) - WITHOUT_EFFECT)
    changed = [key for key in keys if old.get(key) != new.get(key)]
    if changed:
        raise OutputFolderError(
            f"{output} holds another run: it differs in "
            + ", ".join(
                f"{key} ({old.get(key, 'default')!r} there, {new.get(key, 'default')!r} here)" for key in changed[:3]
            )
            + "; choose another output_dir, or remove the folder"
        )
    return checkpoint


def _refuse_renamed_options(path: Path, values: dict) -> None:
    known = D3etrTrainingArguments.__dataclass_fields__
    renamed = {name: RENAMED_OPTIONS[name] for name in values if name in RENAMED_OPTIONS and name not in known}
    if renamed:
        names = ", ".join(f"{old!r} is called {new!r} now" for old, new in renamed.items())
        raise OutputFolderError(
            f"{path} is of an earlier version: {names}; rename it in that file to go on, or choose another output_dir"
        )


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint folder whose trainer state, which is written last, can be read."""
    folders = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            logger.warning(f"{folder} is incomplete (the run stopped while saving it) and is passed over")
            continue
        return str(folder)
    return None


def write_json(path: Path, content) -> None:
    """Content as JSON; see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run may be stopped at any moment."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
