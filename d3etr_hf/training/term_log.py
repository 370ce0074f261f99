"""Means of loss terms between two log entries, exact over processes and accumulated batches."""

from collections.abc import Callable, Mapping

import torch
from transformers import TrainerCallback

PARTS = "parts"


class TermLog:
    """Sums on the device, in a fixed order, reduced when they are read.

    Args:
        average: the mean of a tensor over processes.
        of_all: the names that any process has, given this one's. One whose images show nothing has no denoising terms.
    """

    def __init__(
        self, average: Callable[[torch.Tensor], torch.Tensor], of_all: Callable[[list[str]], list[str]] = list
    ):
        self.average, self.of_all = average, of_all
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor], part: torch.Tensor) -> None:
        """Add one batch's values.

        Args:
            part: the batch's part of its step; over processes' mean and accumulated batches parts add up to one.
        """
        for name, value in {**values, PARTS: part}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self) -> dict[str, float]:
        """The mean over steps of every value since the last reading, the same on all processes; starts afresh."""
        if not self.sums:
            return {}
        names, nothing = sorted(set(self.of_all(list(self.sums)))), torch.zeros_like(self.sums[PARTS])
        values = self.average(torch.stack([self.sums.get(name, nothing).float() for name in names])).tolist()
        means = dict(zip(names, values, strict=True))
        steps = means.pop(PARTS)
        self.sums = {}
        if steps == 0:
            return {}  # all were skipped
        return {name: value / steps for name, value in means.items()}


class StartAfresh(TrainerCallback):
    """Lets logs forget, when a training starts, what an earlier one left unread."""

    def __init__(self, *logs: TermLog):
        self.logs = logs

    def on_train_begin(self, args, state, control, **kwargs):
        for log in self.logs:
            log.sums = {}
