"""What a training shows while it runs: a line a log on a terminal, a table in a notebook.

Every loss term and every metric is in the log history and goes to trackers (`report_to`); shown is what tells at a
glance how the training stands.
"""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import is_in_notebook

from d3etr_hf.training.memory import GIB, held_memory

LOSS, AVERAGE_PRECISION = "loss", "AP"


def show_progress(trainer: Trainer) -> None:
    """Let a trainer show its progress as this module does, where Transformers' own callbacks would."""
    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(LogLines())
    elif trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LogLinesBesideBar())
    elif is_in_notebook():
        from d3etr_hf.training.notebook_table import show_table

        show_table(trainer)


class Pace:
    """How fast a training goes, and when it will end."""

    def __init__(self) -> None:
        self.first_step: int | None = None  # the number of steps taken when this call of the training began
        self._seconds, self._steps = 0.0, 0

    def begin_step(self, step: int) -> None:
        """A step begins after that many."""
        if self.first_step is None:
            self.first_step, self._began = step, time.perf_counter()
            self._mark = self._began

    def end_step(self) -> None:
        """It is over."""
        now = time.perf_counter()
        self._seconds, self._steps, self._mark = self._seconds + now - self._mark, self._steps + 1, now

    def pause(self) -> None:
        """What took the time since the last step was no step."""
        self._mark = time.perf_counter()

    def read(self) -> float | None:
        """Seconds of a step since the last reading, without evaluation and saving; None where there was none."""
        mean = self._seconds / self._steps if self._steps else None
        self._seconds, self._steps = 0.0, 0
        return mean

    def remaining(self, step: int, steps: int) -> timedelta:
        """Until the end, evaluation and saving included, as it went so far."""
        elapsed = time.perf_counter() - self._began
        return timedelta(seconds=round(elapsed / (step - self.first_step) * (steps - step)))


class LogLines(TrainerCallback):
    """Says on the main process how a training stands, in one line at each of its logs; without bars, for log files."""

    def __init__(self) -> None:
        super().__init__()
        self.pace = Pace()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.pace = Pace()

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.pace.begin_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.pace.end_step()

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self.pace.pause()

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        self.pace.pause()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (line := self.line(args, state, logs or {})):
            self.write(line)

    def line(self, args, state, logs: Mapping[str, Any]) -> str:
        """What is shown of a log; nothing of one that tells neither loss nor average precision."""
        if LOSS not in logs:
            parts = scores_of(logs)
        else:
            parts = [f"loss {logs[LOSS]:.4g}"]
            if "learning_rate" in logs:
                parts.append(f"learning rate {logs['learning_rate']:.3g}")
            if logs.get("skipped_steps"):
                parts.append(f"{logs['skipped_steps']:g} steps skipped")
            if (seconds := self.pace.read()) is not None:
                parts.append(f"{seconds:.3g} s a step")
                parts.append(f"{self.pace.remaining(state.global_step, state.max_steps)} left")
            parts.append(f"{peak_memory(args.device) / GIB:.2f} GiB")
        return f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}" if parts else ""

    def write(self, line: str) -> None:
        """Show a line."""
        print(line, flush=True)


class LogLinesBesideBar(LogLines, ProgressCallback):
    """Lines above Transformers' progress bars."""

    def write(self, line: str) -> None:
        """Show a line above the bar."""
        tqdm.write(line)


def scores_of(logs: Mapping[str, Any]) -> list[str]:
    """The average precision of an evaluation in words, of each data set where it has several, and its duration."""
    parts = []
    for name, value in logs.items():
        if name.startswith("eval_") and name.endswith((AVERAGE_PRECISION, f"{AVERAGE_PRECISION}50")):
            parts.append(f"{name.removeprefix('eval_').replace('_', ' ')} {value:.3f}")
    seconds = [value for name, value in logs.items() if name.startswith("eval_") and name.endswith("_runtime")]
    return [*parts, f"evaluated in {sum(seconds):.3g} s"] if parts and seconds else parts


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most on a GPU, or holds now where there is none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held_memory(device)
