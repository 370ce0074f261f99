"""`ResumableTrainer`: Transformers' Trainer whose runs go on exactly where they stopped, whenever that was."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from d3etr_hf.errors import CheckpointError, DetectorLoadError
from d3etr_hf.files import write_errors
from d3etr_hf.models.detector import ADAPTERS, Detector
from d3etr_hf.training.checkpoints import (
    ASIDE,
    MANIFEST,
    MODEL,
    PREFIX,
    check_whole,
    checkpoint_beside,
    newest_whole_checkpoint,
    seal,
)
from d3etr_hf.training.heartbeat import watching_processes
from d3etr_hf.training.processes import on_main_process
from d3etr_hf.training.stopping import GracefulStop
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.weight_average import TRAINED_WEIGHTS, WeightAverage

logger = logging.get_logger(__name__)

ARGUMENTS = "training_args.bin"  # as Trainer calls them
ADAPTER_WEIGHTS = f"{ADAPTERS}.safetensors"


class ResumableTrainer(Trainer):
    """Saves a detector as a stock model, in Transformers' published tensor names, and goes on from whole checkpoints.

    Attributes:
        weight_average: of the student, which is saved instead of it; None where none is kept.
        stop: ends a training when it is asked to.
    """

    args: D3etrTrainingArguments
    model: Detector
    weight_average: WeightAverage | None = None
    stop: GracefulStop

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As Trainer, but from whole checkpoints only; True stands for the newest of them.

        Where none is given that of the training arguments counts, which Trainer passes over.

        Raises:
            CheckpointError: the checkpoint is not whole or not there; with True, none is.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint is True:
            resume_from_checkpoint = on_main_process(self._newest_checkpoint)
        with watching_processes(self.args.ddp_timeout):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_checkpoint(self) -> str:
        checkpoint = newest_whole_checkpoint(Path(self.args.output_dir), self.args.load_best_model_at_end)
        if checkpoint is None:
            raise CheckpointError(f"{self.args.output_dir} holds no checkpoint to go on from")
        return str(checkpoint)

    def _run_epoch(self, *args, **kwargs) -> None:
        """As Trainer, which would take one more step where the last one is done already: of all, or before a stop."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """As Trainer, with all that the run goes on from; only when it is sealed do old checkpoints go."""
        output = Path(self._get_output_dir(trial))
        folder = output / f"{PREFIX}{self.state.global_step}"
        with write_errors(folder), self._put_aside(folder):
            if self.args.should_save:
                self._save_beside(folder)
            with self._arguments_with(save_total_limit=None):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                torch.save(self.args, folder / ARGUMENTS)  # as they are
                seal(folder)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            best = best and str(checkpoint_beside(output, best))
            rotate_checkpoints(str(output), self.args.save_total_limit, best, use_mtime=True)

    def _finalize_training(self, trial, *args, **kwargs) -> TrainOutput:
        """As Trainer; a training that was asked to stop has and keeps the checkpoint from which it goes on."""
        if not self.stop.stopped:
            return super()._finalize_training(trial, *args, **kwargs)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX}{self.state.global_step}"
        if not on_main_process((folder / MANIFEST).exists):
            self._save_checkpoint(self.model, trial)  # where only better ones are saved
        with self._arguments_with(save_total_limit=None, load_best_model_at_end=False):
            return super()._finalize_training(trial, *args, **kwargs)

    @contextmanager
    def _put_aside(self, folder: Path) -> Iterator[None]:
        """Keep a checkpoint of this step that is there already until another is whole; if that fails it comes back."""
        aside = folder.with_name(f"{folder.name}{ASIDE}")
        if self.args.should_save and (folder / MANIFEST).exists():
            folder.rename(aside)
        self.accelerator.wait_for_everyone()
        try:
            yield
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint takes the place that a full disk lacks
                if aside.exists():
                    aside.rename(folder)
            raise
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _arguments_with(self, **changes) -> Iterator[None]:
        """The context in which training arguments have other values."""
        kept = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            yield
        finally:
            vars(self.args).update(kept)

    def _save_beside(self, folder: Path) -> None:
        """Keep what trains but is no part of the student, so that the run can go on."""
        folder.mkdir(parents=True, exist_ok=True)
        adapters = dict(self.model.query_adapters.named_parameters())
        if adapters:
            tensors = {name: value.detach().contiguous() for name, value in adapters.items()}
            save_file(tensors, folder / ADAPTER_WEIGHTS)
        if self.weight_average is not None:
            self.weight_average.save(folder)

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """As Trainer, with averaged weights where an average is kept, in checkpoints too: what was evaluated."""
        with self._averaged(), write_errors(Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, *args, **kwargs)

    def _averaged(self) -> AbstractContextManager[None]:
        """The context in which the student has its averaged weights, where an average is kept."""
        return nullcontext() if self.weight_average is None else self.weight_average.in_place()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Reads a checkpoint back through `from_pretrained`.

        Trainer loads the file's names as they are and not strictly; published names may differ from the module's, so
        most of the student would be left at its start values with nothing but a warning.
        """
        folder = Path(resume_from_checkpoint)
        on_main_process(lambda: check_whole(folder, with_best=self.args.load_best_model_at_end))
        self._read_checkpoint(folder, self.model if model is None else model)

    def _read_checkpoint(self, folder: Path, model: torch.nn.Module) -> None:
        saved, info = type(self.model).from_pretrained(folder, output_loading_info=True)
        if lost := sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]:
            raise DetectorLoadError(f"{folder} is damaged: {len(lost)} tensors are missing, as {lost[:3]}")
        loaded = saved.state_dict()
        wanted = {f"{ADAPTERS}.{name}" for name, _ in self.model.query_adapters.named_parameters()}
        extra = folder / ADAPTER_WEIGHTS
        if extra.exists():
            loaded |= {f"{ADAPTERS}.{name}": value for name, value in load_file(extra).items()}
        if missing := sorted(wanted - set(loaded)):
            raise CheckpointError(f"{folder} is no checkpoint of this run: {missing} are not in {extra}")
        model.load_state_dict(loaded, strict=False)  # all of the student, and of the rest what is trained
        if self.weight_average is not None:
            self.weight_average.load(folder, loaded)
        elif (folder / TRAINED_WEIGHTS).exists():
            raise CheckpointError(f"{folder} holds averaged weights: set ema_decay as its run did")

    def _load_best_model(self) -> None:
        """As Trainer, but by `from_pretrained`, for the reason given in `_load_from_checkpoint`."""
        best = checkpoint_beside(Path(self.args.output_dir), self.state.best_model_checkpoint)
        logger.info(f"Loading best model from {best}")
        on_main_process(lambda: check_whole(best, MODEL))
        self._read_checkpoint(best, self.model)
