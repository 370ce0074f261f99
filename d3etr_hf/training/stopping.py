"""A training that is asked to stop ends after a whole step, with a checkpoint; all processes after the same one."""

import signal
from collections.abc import Callable

import torch
from transformers import TrainerCallback


class GracefulStop(TrainerCallback):
    """Ends a training when it is asked to.

    On several processes what each was asked rides on the counts that they exchange before a step, so that all end
    after the same one. An evaluation that is due comes first: the run that goes on is the one that nothing stopped.

    Args:
        processes: how many train together.

    Attributes:
        asked: whether this process was asked; may be set at any time, from a signal handler too.
        stopped: whether the last training ended before its last step.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self.asked = self.stopped = self._agreed = False

    def tell(self) -> float:
        """What the other processes are to be told before a step."""
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


def start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    """Let a data loader's worker pass over the first SIGTERM and Ctrl-C: launchers send them to all processes.

    Args:
        start: what starts the worker otherwise.
        worker: its number.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass_over_once)
    if start is not None:
        start(worker)


def _pass_over_once(number: int, frame) -> None:
    signal.signal(number, signal.SIG_DFL)
