"""An exponential moving average of the weights, which is evaluated and saved instead of them.

RT-DETR, D-FINE and their heirs are trained so: the average of the last thousands of steps is better than any of them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

AVERAGED_WEIGHTS = "averaged.safetensors"
STEPS = "steps"


class WeightAverage(TrainerCallback):
    """Keeps the average of a model's parameters; buffers are the model's own (running statistics are averages).

    Args:
        model: on its device, with everything that trains.
        decay: share of the average that a step keeps, in the long run.
        warmup_steps: after so many steps the share has come to 63 % of `decay` (1 - exp(-steps / warmup_steps)).
    """

    def __init__(self, model: torch.nn.Module, decay: float, warmup_steps: int):
        self.model = model

        def mixed(average: torch.Tensor, value: torch.Tensor, steps: torch.Tensor | int) -> torch.Tensor:
            kept = decay * (1 - math.exp(-int(steps) / warmup_steps)) if warmup_steps else decay
            return average.lerp(value, 1 - kept)

        self.average = AveragedModel(model, avg_fn=mixed)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Counts one more step in."""
        self.average.update_parameters(self.model)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; nothing changes before the first step."""
        if not self.average.n_averaged:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._fill(self.average.module.parameters())
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the average beside a checkpoint."""
        state = {name: value.detach().contiguous() for name, value in self.average.module.named_parameters()}
        save_file(state | {STEPS: self.average.n_averaged.reshape(1)}, folder / AVERAGED_WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read it back.

        Raises:
            ValueError: it is not there, or is another model's.
        """
        file = folder / AVERAGED_WEIGHTS
        if not file.exists():
            raise ValueError(
                f"{folder} is no checkpoint of this run: {AVERAGED_WEIGHTS} is not in it (ema_decay is set)"
            )
        state = load_file(file)
        self.average.n_averaged.copy_(state.pop(STEPS)[0])
        own = dict(self.average.module.named_parameters())
        if state.keys() != own.keys():
            raise ValueError(f"{file} is of another model: it differs in {sorted(state.keys() ^ own.keys())[:3]}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)


def check_decay(decay: float | None, warmup_steps: int) -> None:
    """Raises: ValueError for a decay or a warmup out of range."""
    if decay is not None and not (0 < decay < 1 and math.isfinite(decay)):
        raise ValueError(f"ema_decay={decay}: must lie between 0 and 1, or be left out")
    if warmup_steps < 0:
        raise ValueError(f"ema_warmup_steps={warmup_steps}: must be 0 or more")
