"""A training that is asked to stop ends after a whole step, with a checkpoint; all processes after the same one."""

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

# of people and their terminals, of schedulers; Windows has fewer
STOPPING = [
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if name in signal.Signals.__members__
]
LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
# launchers hand on to their processes what a scheduler has sent to all of them: within so many seconds it is the same
HANDED_ON = 2.0


class GracefulStop(TrainerCallback):
    """Ends a training when it is asked to.

    On several processes what each was asked rides on the counts that they exchange before a step, so that all end
    after the same one. An evaluation that is due comes first: the run that goes on is the one that nothing stopped.
    One whose launcher has ended is asked, too: nobody waits for it, or can end it.

    Args:
        processes: how many train together.

    Attributes:
        asked: whether this process was asked; may be set at any time, from a signal handler too.
        stopped: whether the last training ended before its last step.
        orphaned: whether the launcher of this process has ended.
    """

    def __init__(self, processes: int):
        self.processes, self.launcher = processes, launcher()
        self.asked = self.stopped = self.orphaned = self._agreed = False

    def tell(self) -> float:
        """What the other processes are to be told before a step."""
        if self.launcher not in (None, os.getppid()):
            self.asked = self.orphaned = True
        return float(self.asked)

    def hear(self, mean: torch.Tensor) -> None:
        """The mean of what all told; to be called when the step's work has been given to the device."""
        self._agreed = self.processes > 1 and bool(mean > 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = self._agreed = False  # what was asked while the training was made ready is not forgotten

    def on_step_end(self, args, state, control, **kwargs):
        # the end of an epoch is reached, and what is due there done, before the checkpoint
        if self._is_to_stop(control) and not float(state.epoch).is_integer():
            self._stop(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # within the epoch: nothing is due
            control.should_evaluate = control.should_save = control.should_log = False
        elif self._is_to_stop(control):
            self._stop(args, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.asked = False

    def _is_to_stop(self, control) -> bool:
        asked = self.asked if self.processes == 1 else self._agreed
        return asked and not control.should_training_stop

    def _stop(self, args, control) -> None:
        args.save_only_model = False  # the run goes on from this checkpoint
        control.should_save = control.should_training_stop = self.stopped = True


@functools.cache
def launcher() -> int | None:
    """The process number of `accelerate launch` or `torchrun`, if one of them started this process.

    To be called early: it is remembered, so that its end is noticed later.
    """
    parent = os.getppid()
    words = [Path(word).name for word in command_line_of(parent)]
    by_variables = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    # a shell may export such a variable and be no launcher
    return parent if by_variables and (not words or any(word in LAUNCHERS for word in words)) else None


def command_line_of(process: int | None) -> list[str]:
    """The words by which a process was started; none where the system does not say."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")[:-1]  # of Linux
    except OSError:
        return []


def start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    """Let a data loader's worker pass over the first of these signals: launchers send them to all processes.

    Args:
        start: what starts the worker otherwise.
        worker: its number.
    """
    first: list[float] = []

    def pass_over(number: int, frame) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] > HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in STOPPING:
        signal.signal(number, pass_over)
    if start is not None:
        start(worker)
