"""SIGTERM and Ctrl-C end a training after the step that is going on, with a checkpoint and how to go on."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from d3etr_hf.errors import TrainingStopped
from d3etr_hf.publishing.hub_trainer import D3etrTrainer

logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_at_signals(trainer: D3etrTrainer) -> Iterator[None]:
    """The context in which the first of these signals stops the trainer gracefully, and a second one at once.

    Raises:
        TrainingStopped: the training was stopped; a checkpoint is written.
    """
    process = os.getpid()
    received: list[int] = []

    def stop(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:
            return
        trainer.stop.asked = True
        received.append(number)
        if trainer.is_world_process_zero():
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step, with a checkpoint; once more ends it at once\n".encode())

    previous = [signal.signal(number, stop) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, previous, strict=True):
            signal.signal(number, handler)
    if trainer.stop.stopped:
        first = signal.Signals(received[0]) if received else signal.SIGTERM
        raise TrainingStopped(_message(trainer, first.name), first)
    if received:
        logger.warning("the last step had been taken: the run is brought to its end; once more ends it at once")


def _message(trainer: D3etrTrainer, name: str) -> str:
    state = trainer.state
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
    stopped = f"stopped by {name} after step {state.global_step} of {state.max_steps}: {checkpoint}"
    program = Path(sys.argv[0]).name.split()
    if trainer.args.world_size > 1 or program[0] != "d3etr":
        return f"{stopped}; to go on, launch it again as before"
    return f"{stopped}; to go on:\n{shlex.join([*program, *sys.argv[1:]])}"
