"""A loss or a gradient that is not finite stops a training, or costs it a step, and is kept to be looked at."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from d3etr_hf.errors import NonFiniteCostError, NonFiniteLossError, UnsupportedOptionError, WriteError
from d3etr_hf.training.checkpoints import checkpoints_of
from d3etr_hf.training.kept_step import Batch, KeptStep, write_step
from d3etr_hf.training.training_arguments import DISTILLATION_OPTIONS

if TYPE_CHECKING:
    from d3etr_hf.training.trainer import DistillationTrainer

logger = logging.get_logger(__name__)

FOLDER = "not_finite"


class NonFiniteGuard:
    """Watches the loss terms of each batch, and the gradient of each step; float16's scaler does so by itself.

    On several processes a batch of one spoils the gradient of all: they stop, or skip the step, together, by the
    gradient's norm, which is the same on each.

    Args:
        trainer: whose training is watched.
        most_skipped: optimizer steps to skip before the training is stopped.

    Attributes:
        skipped: steps since this was made.
    """

    def __init__(self, trainer: "DistillationTrainer", most_skipped: int):
        self.trainer, self.most_skipped, self.skipped = trainer, most_skipped, 0
        self.processes = trainer.accelerator.num_processes
        if self.scaled and most_skipped:
            raise UnsupportedOptionError(
                f"skip_nonfinite_steps={most_skipped}: float16's gradient scaler passes over such steps by itself; "
                "leave it out"
            )
        self._batch: Batch
        self._layers: dict[str, int] = {}
        self._values = torch.zeros(0)
        self._reports: list[str] = []

    @property
    def scaled(self) -> bool:
        """Whether float16's scaler takes care of it."""
        return self.trainer.accelerator.scaler is not None

    def begin(self, inputs: Mapping, counts: torch.Tensor) -> None:
        """Remember a batch before its forward pass."""
        self._batch = Batch.begin(inputs, counts)

    def watch(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Terms of the batch, `(L,)` each. They are read later, so that the device need not be waited for here."""
        self._layers = {name: len(term) for name, term in terms.items()}
        self._values = torch.cat([term.detach() for term in terms.values()])

    def values(self) -> dict[str, list[float]]:
        """The last batch's terms by name, the weighted value in each layer."""
        of_layers = self._values.split(list(self._layers.values()))
        return {name: values.tolist() for name, values in zip(self._layers, of_layers, strict=True)}

    def forget(self) -> None:
        """Let go of what was found in a step whose gradient is not used."""
        self._reports = []

    def refusal(self, error: NonFiniteCostError) -> NonFiniteLossError:
        """The error of a batch whose predictions cannot be matched."""
        return NonFiniteLossError(self._report(str(error), self._batch.image_ids[error.image : error.image + 1]))

    def look_at_terms(self) -> bool:
        """Whether the last batch's terms are finite; to be called when the device has been given all its work.

        Raises:
            NonFiniteLossError: they are not, on the only process, and the step may not be skipped.
        """
        if self.scaled or self._values.isfinite().all():
            return True
        wrong = {
            name: [str(layer) for layer, value in enumerate(values) if not math.isfinite(value)]
            for name, values in self.values().items()
        }
        bad = [f"{name} (layer {', '.join(layers)})" for name, layers in wrong.items() if layers]
        report = self._report(f"loss term {', '.join(bad)} is NaN or infinite", self._batch.image_ids)
        waits = self.trainer.model.training and (self.most_skipped > 0 or self.processes > 1)
        if not waits:
            raise NonFiniteLossError(report)
        self._reports.append(report)
        return False

    def look_at_gradient(self, norm: torch.Tensor | float, model: torch.nn.Module) -> None:
        """Stop, or take the gradient away, where it is not finite; to be called before the optimizer's step.

        Args:
            norm: the gradient's, over all parameters and processes.
            model: what has the gradient.

        Raises:
            NonFiniteLossError: it is not finite, and no further step may be skipped.
        """
        if self.scaled:
            return
        if torch.as_tensor(norm).isfinite():
            if self._reports:
                raise NonFiniteLossError(self._reports[0])
            return
        reports = gather_object(self._reports) if self.processes > 1 else self._reports
        if not reports:
            what = "every loss term is finite, but the gradient is NaN or infinite"
            reports = [self._report(what, self._batch.image_ids)]
        told = "; ".join(reports)
        self._reports = []
        if self.skipped >= self.most_skipped:
            before = f"; {self.skipped} steps were skipped before it, as many as may be" if self.most_skipped else ""
            error = NonFiniteLossError(told + before)
            error.of_all_processes = True
            raise error
        self.skipped += 1
        logger.warning(f"{told}; the step is skipped ({self.skipped} of at most {self.most_skipped})")
        model.zero_grad(set_to_none=True)  # an optimizer leaves a parameter without a gradient as it is

    def _report(self, what: str, image_ids: list[int]) -> str:
        trainer = self.trainer
        step, output = trainer.state.global_step + 1, Path(trainer.args.output_dir)
        place = f"step {step}, image ids {image_ids}"
        if self.processes > 1:
            place = f"rank {trainer.args.process_index}, {place}"
        saved = checkpoints_of(output)
        last = f"the last checkpoint is {saved[0]}" if saved else "no checkpoint had been saved yet"
        report = f"{place}: {what}; {last}"
        if not trainer.model.training:
            return report
        path = output / FOLDER / f"step_{step}_rank_{trainer.args.process_index}.safetensors"
        try:
            write_step(path, self._kept(what), trainer.model, self._batch)
        except WriteError as error:
            return f"{report}; the step could not be kept: {error}"
        return f"{report}; to look at the step again: d3etr reproduce {path}"

    def _kept(self, what: str) -> KeptStep:
        trainer = self.trainer
        return KeptStep(
            what=what,
            step=trainer.state.global_step + 1,
            rank=trainer.args.process_index,
            processes=self.processes,
            labels=self._batch.inputs["labels"],
            config=json.loads(trainer.model.config.to_json_string(use_diff=False)),
            teacher=None if trainer.teacher is None else trainer.teacher.name,
            options={name: getattr(trainer.args, name) for name in (*DISTILLATION_OPTIONS, "detection_weight")},
            mixed_precision=trainer.accelerator.mixed_precision,
            device=self._batch.counts.device.type,
        )
