"""Signals end a training after the step that is going on, with a checkpoint and the command that goes on."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from d3etr_hf.errors import TrainingStopped
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.checkpoints import checkpoints_of, was_saved
from d3etr_hf.training.stopping import HANDED_ON, STOPPING, command_line_of, launcher

logger = logging.get_logger(__name__)


@contextmanager
def stopping_at_signals(trainer: D3etrTrainer) -> Iterator[None]:
    """The context in which the first of these signals stops the trainer gracefully, and one that comes later at once.

    They are SIGTERM, Ctrl-C, a terminal that is closed (but for `nohup`) and SIGUSR1, which schedulers can send.

    Raises:
        TrainingStopped: the training was stopped; a checkpoint is written.
    """
    process, command = os.getpid(), _command()
    received: list[signal.Signals] = []
    first_came = 0.0

    def stop(number: int, frame) -> None:
        nonlocal first_came
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            return
        if received:
            if time.monotonic() - first_came > HANDED_ON:
                if trainer.is_world_process_zero():
                    os.write(2, f"\nended at once: {what_is_kept(Path(trainer.args.output_dir))}\n".encode())
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        trainer.stop.asked, first_came = True, time.monotonic()
        received.append(signal.Signals(number))
        if trainer.is_world_process_zero():
            said = f"{received[0].name}: stopping after this step, with a checkpoint; once more ends it at once"
            os.write(2, f"\n{said}\n".encode())

    previous = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        # a launcher passes on what it was sent, and kills who does not end of it
        if launcher() is not None or number == signal.SIGINT or previous[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
        if trainer.stop.stopped:
            # a launcher ends the others when the first of them has ended: not before the checkpoint is whole
            trainer.accelerator.wait_for_everyone()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if trainer.stop.stopped:
        cause = "the end of its launcher" if trainer.stop.orphaned else "a signal to another process"
        cause = received[0].name if received else cause
        raise TrainingStopped(_message(trainer, cause, command), received[0] if received else signal.SIGTERM)
    if received:
        logger.warning("the last step had been taken: the run is brought to its end; once more ends it at once")


@contextmanager
def saying_what_is_kept(output: Path) -> Iterator[None]:
    """The context in which Ctrl-C outside of training's steps tells what there is of the run.

    Raises:
        TrainingStopped: it came.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingStopped(f"interrupted: {what_is_kept(output)}", signal.SIGINT) from None


def what_is_kept(output: Path) -> str:
    """What a run that ends now leaves, in words."""
    whole = [folder for folder in checkpoints_of(output) if was_saved(folder)]
    if not whole:
        return "nothing was kept, since no checkpoint had been written; the same call begins again"
    return f"what came after {whole[0]} is lost; the same call goes on from there"


def _command() -> list[str] | None:
    """What was called; None where that cannot be said, or was another call on each machine."""
    if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return None
    if launcher() is None:
        program = Path(sys.argv[0]).name.split()
        return [*program, *sys.argv[1:]] if program[:1] == ["d3etr"] else None
    words = command_line_of(launcher())
    if words[1:] and Path(words[1]).name in ("accelerate", "torchrun"):  # after the interpreter
        words = [Path(words[1]).name, *words[2:]]
    return words or None


def _message(trainer: D3etrTrainer, cause: str, command: list[str] | None) -> str:
    state = trainer.state
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
    stopped = f"stopped by {cause} after step {state.global_step} of {state.max_steps}: {checkpoint}"
    if command is None:
        return f"{stopped}; to go on, launch it again as before"
    return f"{stopped}; to go on:\n{shlex.join(command)}"
