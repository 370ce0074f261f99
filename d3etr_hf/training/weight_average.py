"""An exponential moving average of the weights, which is evaluated and saved instead of them.

RT-DETR, D-FINE and their heirs are trained so: the average of the last thousands of steps is better than any of them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from d3etr_hf.errors import CheckpointError

# beside a checkpoint, which holds the average: what goes on training
TRAINED_WEIGHTS = "trained.safetensors"
STEPS = "steps"


class WeightAverage(TrainerCallback):
    """Keeps the average of a student's parameters and running statistics.

    Not `torch.optim.swa_utils.AveragedModel`, which asks the device for its count of steps once a tensor.

    Args:
        model: on its device.
        decay: share of the average that a step keeps, in the long run.
        warmup_steps: after so many steps the share has come to 63 % of `decay` (1 - exp(-steps / warmup_steps)).
        aside: prefix of what is not averaged, since it is no part of what is evaluated or saved.
    """

    def __init__(self, model: torch.nn.Module, decay: float, warmup_steps: int, aside: str):
        self.model, self.decay, self.warmup_steps, self.aside, self.steps = model, decay, warmup_steps, aside, 0
        self.values = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What changes in training, by name: parameters that train and running statistics."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        statistics = {name: b for name, b in self.model.named_buffers() if b.is_floating_point()}
        return {name: tensor for name, tensor in (trained | statistics).items() if not name.startswith(self.aside)}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        """Counts one more step in."""
        warm = 1 - math.exp(-self.steps / self.warmup_steps) if self.warmup_steps else 1.0
        kept = self.decay * warm if self.steps else 0.0
        for name, tensor in self._tensors().items():
            self.values[name].lerp_(tensor, 1 - kept)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; nothing changes before the first step."""
        if not self.steps:
            yield
            return
        trained = {name: tensor.clone() for name, tensor in self._tensors().items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(values[name])

    def save(self, folder: Path) -> None:
        """Write what goes on training beside a checkpoint that holds the average."""
        state = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(state | {STEPS: torch.tensor([self.steps])}, folder / TRAINED_WEIGHTS)

    def load(self, folder: Path, averaged: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint: the model trains on from what trained, the average from what was saved.

        Args:
            averaged: the checkpoint's tensors, by name.

        Raises:
            CheckpointError: what goes on training is not there, or is another model's.
        """
        file = folder / TRAINED_WEIGHTS
        if not file.exists():
            raise CheckpointError(
                f"{folder} is no checkpoint of this run: {TRAINED_WEIGHTS} is not in it (ema_decay is set)"
            )
        trained = load_file(file)
        steps = int(trained.pop(STEPS))
        if different := sorted(trained.keys() ^ self.values.keys()):
            raise CheckpointError(f"{file} is of another model: it differs in {different[:3]}")
        for name, value in self.values.items():
            value.copy_(averaged[name])
        self._fill(trained)
        self.steps = steps


def check_decay(decay: float | None, warmup_steps: int) -> None:
    """Raises: ValueError for a decay or a warmup out of range."""
    if decay is not None and not (0 < decay < 1 and math.isfinite(decay)):
        raise ValueError(f"ema_decay={decay}: must lie between 0 and 1, or be left out")
    if warmup_steps < 0:
        raise ValueError(f"ema_warmup_steps={warmup_steps}: must be 0 or more")
