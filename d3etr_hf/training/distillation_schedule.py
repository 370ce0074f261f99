"""When a training distils: on every step or each n-th, to the end or not, with weights that stay or fall."""

import math
from dataclasses import dataclass, replace

from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.training.distillation import Distillation


@dataclass(frozen=True)
class DistillationSchedule:
    """What of a distillation is on in a step; the fields are documented in `D3etrTrainingArguments`."""

    distillation_interval: int = 1
    distillation_end: float = 1.0
    distillation_decay: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether every step is as the first."""
        return self == DistillationSchedule()

    def weight(self, step: int, steps: int) -> float:
        """By what the distillation weights are multiplied in a step; 0 where it is without distillation.

        Args:
            step: optimizer step, from 0.
            steps: of the whole training; 0 where that is not known.
        """
        last = self.distillation_end * steps
        if step % self.distillation_interval or (steps and step >= last):
            return 0.0
        return 1 - step / last if self.distillation_decay and steps else 1.0

    def share(self, steps: int) -> float:
        """How many of a training's steps distil, as a share of all; 1 where their number is not known."""
        return math.ceil(self.distillation_end * steps / self.distillation_interval) / steps if steps else 1.0

    def first_plain_step(self, steps: int) -> int | None:
        """The first step, from 0, that does not distil; None where each does."""
        step = 1 if self.distillation_interval > 1 else math.ceil(self.distillation_end * steps)
        return step if step < steps else None

    def at(self, options: Distillation, step: int, steps: int) -> Distillation:
        """The options of a step; without distillation the student's own detection loss is left."""
        weight = self.weight(step, steps)
        if weight == 1:
            return options
        changed = replace(options, **{name: weight * getattr(options, name) for name in options.term_weights})
        return changed if weight > 0 else replace(changed, auxiliary_queries="none")

    def check(self, options: Distillation) -> None:
        """Refuse a schedule out of range, or of nothing.

        Raises:
            UnsupportedOptionError: the message names the option.
        """
        if self.distillation_interval < 1:
            raise UnsupportedOptionError(f"distillation_interval={self.distillation_interval}: must be 1 or more")
        if not 0 < self.distillation_end <= 1:
            raise UnsupportedOptionError(
                f"distillation_end={self.distillation_end}: must be a share of the training above 0, 1 for all of it"
            )
        if self.is_constant:
            return
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        if options.detection_weight == 0:
            raise UnsupportedOptionError(
                f"{shown}: steps without distillation learn by the detection loss, and detection_weight is 0"
            )
        if not options.follows_teacher and options.auxiliary_queries == "none":
            raise UnsupportedOptionError(f"{shown}: nothing is distilled, so there is nothing to plan; leave them out")
