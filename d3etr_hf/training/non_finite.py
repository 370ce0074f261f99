"""A loss or a gradient that is not finite stops a training, or costs it a step, and is kept to be looked at."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

from d3etr_hf.errors import NonFiniteCostError, NonFiniteLossError, UnsupportedOptionError, WriteError
from d3etr_hf.training.checkpoints import checkpoints_of
from d3etr_hf.training.kept_step import Batch, KeptStep, write_step
from d3etr_hf.training.optimization import keeps_running_statistics

if TYPE_CHECKING:
    from d3etr_hf.training.trainer import DistillationTrainer

logger = logging.get_logger(__name__)

FOLDER = "not_finite"


@dataclass
class _Watched:
    """A batch of the step under way, and its terms by name, `(L,)` each, when they are known."""

    batch: Batch
    terms: dict[str, torch.Tensor] = field(default_factory=dict)

    def values(self) -> dict[str, list[float]]:
        return {name: term.tolist() for name, term in self.terms.items()}

    def what_is_wrong(self) -> str | None:
        """The terms that are not finite, with their layers; None where all are."""
        wrong = {
            name: [str(layer) for layer, value in enumerate(values) if not math.isfinite(value)]
            for name, values in self.values().items()
        }
        bad = [f"{name} (layer {', '.join(layers)})" for name, layers in wrong.items() if layers]
        return f"loss term {', '.join(bad)} is NaN or infinite" if bad else None


class NonFiniteGuard(TrainerCallback):
    """Sees to it that no optimizer step is taken by a gradient that is not finite; float16's scaler does so by itself.

    A loss term that is not finite makes the whole gradient NaN, and the gradient of one process that of all. So they
    stop, or skip the step, together, by the gradient's norm, which is the only thing that is read in a step.

    Args:
        trainer: whose training is watched.

    Attributes:
        skipped: steps of this training that were skipped, before it was interrupted too.
    """

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer, self.skipped = trainer, 0
        self.most_skipped = trainer.args.skip_nonfinite_steps
        self.processes = trainer.accelerator.num_processes
        if self.scaled and self.most_skipped:
            raise UnsupportedOptionError(
                f"skip_nonfinite_steps={self.most_skipped}: float16's gradient scaler passes over such steps by "
                "itself; leave it out"
            )
        self._watched: list[_Watched] = []
        self._statistics: dict[str, torch.Tensor] | None = None
        self._keeps_statistics = keeps_running_statistics(trainer.model)

    @property
    def scaled(self) -> bool:
        """Whether float16's scaler takes care of it."""
        return self.trainer.accelerator.scaler is not None

    @property
    def folder(self) -> Path:
        """Where steps are kept."""
        return Path(self.trainer.args.output_dir) / FOLDER

    def on_train_begin(self, args, state, control, **kwargs):
        """A training that goes on knows by the files how many steps it has skipped."""
        numbers = [path.name.split("_")[1] for path in self.folder.glob("step_*_rank_*.safetensors")]
        steps = {int(number) for number in numbers if number.isdecimal()}
        self.skipped = sum(step <= state.global_step for step in steps)
        self.forget()

    def on_step_end(self, args, state, control, **kwargs):
        """A step that was left to float16's scaler ends here: `undo` has come before, if it was skipped."""
        self.forget()

    def begin(self, inputs: Mapping, counts: torch.Tensor) -> None:
        """Remember a batch before its forward pass, and before a step what batch norm has counted."""
        if not self._watched and self._keeps_statistics and self.trainer.model.training:
            buffers = self.trainer.model.named_buffers()
            self._statistics = {name: buffer.clone() for name, buffer in buffers if buffer.is_floating_point()}
        if not self.trainer.model.training:
            self.forget()
        self._watched.append(_Watched(Batch.begin(inputs, counts)))

    def watch(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Terms of the batch, `(L,)` each. They are read later, so that the device need not be waited for here.

        Returns:
            What the loss is to be multiplied by: 1, or NaN where a term is not finite.
        """
        self._watched[-1].terms = {name: term.detach() for name, term in terms.items()}
        finite = torch.cat(list(self._watched[-1].terms.values())).isfinite().all()
        return torch.where(finite, 1.0, torch.nan)

    def values(self) -> dict[str, list[float]]:
        """The last batch's terms by name, the weighted value in each layer."""
        return self._watched[-1].values()

    def forget(self) -> None:
        """Let go of the step under way: its gradient has been looked at, or is not used."""
        self._watched, self._statistics = [], None

    def undo(self) -> None:
        """Give batch norm the statistics back that it had before the step."""
        for name, buffer in self.trainer.model.named_buffers() if self._statistics else ():
            if name in self._statistics:
                buffer.copy_(self._statistics[name])

    def refusal(self, error: NonFiniteCostError) -> NonFiniteLossError:
        """The error of a batch whose predictions cannot be matched."""
        batch = self._watched[-1].batch
        return NonFiniteLossError(self._report(str(error), batch, batch.image_ids[error.image : error.image + 1]))

    def look_at_terms(self) -> None:
        """Raises: NonFiniteLossError: a term of the last batch, which is not trained on, is not finite."""
        watched = self._watched[-1]
        self.forget()
        if not self.scaled and (what := watched.what_is_wrong()):
            raise NonFiniteLossError(self._report(what, watched.batch, watched.batch.image_ids))

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
            self.forget()
            return
        self.undo()
        told = "; ".join(self._reports())
        self.forget()
        if self.skipped >= self.most_skipped:
            before = f"; {self.skipped} steps were skipped before it, as many as may be" if self.most_skipped else ""
            error = NonFiniteLossError(told + before)
            error.of_all_processes = True
            raise error
        self.skipped += 1
        logger.warning(f"{told}; the step is skipped ({self.skipped} of at most {self.most_skipped})")
        model.zero_grad(set_to_none=True)  # an optimizer leaves a parameter without a gradient as it is

    def _reports(self) -> list[str]:
        """What each process has to say of the step, the same on all; one report a process."""
        found = [(watched.batch, what) for watched in self._watched if (what := watched.what_is_wrong())]
        own = [self._report(what, batch, batch.image_ids) for batch, what in found[:1]]
        reports = gather_object(own) if self.processes > 1 else own
        if reports:
            return reports
        batch, accumulated = self._watched[-1].batch, len(self._watched)
        what = "every loss term is finite, but the gradient is NaN or infinite"
        if accumulated > 1:
            what = f"{what} (of {accumulated} accumulated batches; this is the last)"
        own = [self._report(what, batch, batch.image_ids)]
        return gather_object(own) if self.processes > 1 else own

    def _report(self, what: str, batch: Batch, image_ids: list[int]) -> str:
        trainer = self.trainer
        step, rank = trainer.state.global_step + 1, trainer.args.process_index
        place = f"step {step}, image ids {image_ids}"
        if self.processes > 1:
            place = f"rank {rank}, {place}"
        saved = checkpoints_of(Path(trainer.args.output_dir))
        last = f"the last checkpoint is {saved[0]}" if saved else "no checkpoint had been saved yet"
        report = f"{place}: {what}; {last}"
        if not trainer.model.training:
            return report
        path = self.folder / f"step_{step}_rank_{rank}.safetensors"
        try:
            write_step(path, self._kept(what, batch), trainer.model, batch)
        except WriteError as error:
            return f"{report}; the step could not be kept: {error}"
        return f"{report}; to look at the step again: d3etr reproduce {path}"

    def _kept(self, what: str, batch: Batch) -> KeptStep:
        trainer = self.trainer
        return KeptStep(
            what=what,
            step=trainer.state.global_step + 1,
            rank=trainer.args.process_index,
            processes=self.processes,
            labels=batch.inputs["labels"],
            config=json.loads(trainer.model.config.to_json_string(use_diff=False)),
            teacher=None if trainer.teacher is None else trainer.teacher.name,
            options=asdict(trainer.distillation) | {"layer_map": trainer.args.layer_map, "seed": trainer.args.seed},
            mixed_precision=trainer.accelerator.mixed_precision,
            device=batch.counts.device.type,
        )
