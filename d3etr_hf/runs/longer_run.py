"""A run that is called again with more steps or epochs: whether it can go on, and what to do where it cannot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3etr_hf.errors import OutputFolderError
from d3etr_hf.training.early_stopping import evaluations_since_best
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

STEPS, EPOCHS = "max_steps", "num_train_epochs"
OF_LENGTH = {STEPS, EPOCHS}  # all that say how long a run is
DEFAULTS = {STEPS: -1, EPOCHS: 3.0}
CONSTANT = ("constant", "constant_with_warmup")
# below 1 they are shares of the whole training
SHARES = ("warmup_steps", "eval_steps", "save_steps", "logging_steps", "distillation_end", "strong_end_fraction")
# what follows from the length whenever it is switched on
PLANNED = ("mosaic", "distillation_decay")


def is_longer(old: dict[str, Any], new: dict[str, Any], changed: list[str]) -> bool:
    """Whether of two runs' options the second differ from the first by a longer training alone.

    Args:
        old, new: options by name, without those at their defaults.
        changed: names of those that differ.
    """
    if not changed or not set(changed) <= DEFAULTS.keys():
        return False
    before, after = ({name: options.get(name, value) for name, value in DEFAULTS.items()} for options in (old, new))
    if before[STEPS] > 0 and after[STEPS] > 0:
        return after[STEPS] > before[STEPS]
    return before[STEPS] < 0 and after[STEPS] < 0 and after[EPOCHS] > before[EPOCHS]


def refuse_planned_length(output: Path, old: dict[str, Any], new: dict[str, Any], changed: list[str]) -> None:
    """Let a longer run go on only where its steps so far are those that a run of that length would have taken.

    Args:
        output: the run's folder.
        old, new, changed: as in `is_longer`, which they are.

    Raises:
        OutputFolderError: the learning rate, or when is logged, evaluated or saved, follows from the length.
    """
    constant = new.get("lr_scheduler_type") in CONSTANT and new.get("learning_rate_drop") is None
    shares = [name for name in SHARES if 0 < (new.get(name) or 0) < 1]
    shares += [name for name in PLANNED if new.get(name)]
    if constant and not shares:
        return
    lengths = ", ".join(f"{name} {old.get(name, DEFAULTS[name]):g}" for name in changed)
    asked = ", ".join(f"{name} {new.get(name, DEFAULTS[name]):g}" for name in changed)
    cause = f"{shares[0]} follows it" if constant else "its learning rate was planned for it"
    raise OutputFolderError(
        f"{output} holds this run with {lengths}, and cannot go on to {asked}: {cause}. Train its model on in another "
        f"run: --model {output} --output_dir NEW_FOLDER, without model_config"
        + ("" if constant else " (a run with --lr_scheduler_type constant would go on here)")
    )


def refuse_without_checkpoint(output: Path, checkpoint: str | None) -> None:
    """A finished run goes on from a checkpoint only.

    Raises:
        OutputFolderError: it has none.
    """
    if checkpoint is None:
        raise OutputFolderError(
            f"{output} holds this run, finished, without a checkpoint to go on from: train its model on in another "
            f"run: --model {output} --output_dir NEW_FOLDER, without model_config"
        )


def refuse_stopped_early(output: Path, log_history: Sequence[Mapping], args: D3etrTrainingArguments) -> None:
    """A longer run that goes on from where it got no better would not take another step.

    Args:
        output: the run's folder.
        log_history: what it logged so far.
        args: of the longer run.

    Raises:
        OutputFolderError: its evaluations got no better for `early_stopping_patience` of them.
    """
    if args.early_stopping_patience is None:
        return
    without_gain = evaluations_since_best(log_history, args)
    if without_gain >= args.early_stopping_patience:
        raise OutputFolderError(
            f"{output} holds this run stopped early, since in {without_gain} evaluations {args.metric_for_best_model} "
            "was no better: a longer one would take no further step. Train its model on in another run: "
            f"--model {output} --output_dir NEW_FOLDER, without model_config, and without early_stopping_patience or "
            "with a larger one"
        )
