"""The `d3etr` command: one subcommand a file in this folder, imported only when it is called."""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from d3etr_hf import __version__
from d3etr_hf.errors import TrainingStopped, UserError

COMMANDS = {
    "data": "`d3etr data check FOLDER`: what is in a data set, and what is wrong with it",
    "train": "a detector without a teacher: one that will teach, or a student to compare with",
    "distill": "a student from a teacher, by D3ETR",
    "compare": "families, ways of training and seeds: a matrix of runs from one file, and its table",
    "reproduce": "a training step whose loss or gradient was not finite: where it begins",
    "evaluate": "COCO average precision of a detector",
    "publish": "a model card, and the upload to the Hub",
    "convert": "a stock checkpoint from what the authors of a detector published",
    "export": "ONNX, checked against PyTorch",
    "predict": "detections on images of your own: a picture each, and one JSON file",
    "visualize": "pictures of detections and of attention",
    "analyze": "what each decoder layer adds and costs, and what distillation can bring",
    "benchmark": "parameters, FLOPs and milliseconds of saved detectors",
    "demo": "everything, from synthetic data to a published student's card",
    "make-shapes": "the synthetic data set",
}

CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell tells of tools that are ended by it


def main() -> None:
    """What `d3etr` runs: `d3etr COMMAND [arguments]`."""
    with quiet_once_nobody_reads():
        call()


def call() -> None:
    """Does what the arguments in `sys.argv` say."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(__version__)
    elif command in COMMANDS:
        sys.argv = [sys.argv[0], *arguments]
        run_command(command)
    else:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "d3etr --help lists those there are"
        print(f"d3etr: error: there is no command '{command}'; {hint}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """The commands with a line each."""
    lines = [f"  {name:<13}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: d3etr COMMAND [arguments]", "", *lines, "", "d3etr COMMAND --help says what a command takes."]
    )


def run_command(name: str) -> None:
    """Runs a subcommand on the arguments in `sys.argv`."""
    sys.argv[0] = f"d3etr {name}"  # as --help and errors call it
    import_module("d3etr_hf.optional_torchvision")  # before anything imports Transformers
    run(import_module(f"d3etr_hf.cli.{name.replace('-', '_')}").main)


def run(main: Callable[[], None]) -> None:
    """Calls `main`, with this package's own news shown on the main process.

    A UserError ends the program with its message and exit code 2, an interruption with 130, a training that SIGTERM
    or Ctrl-C stopped with 128 + the signal; all other errors keep their traceback.
    """
    program = Path(sys.argv[0]).name
    if os.environ.get("RANK", "0") == "0":
        news = logging.getLogger("d3etr_hf")
        news.setLevel(logging.INFO)
        news.addHandler(logging.StreamHandler())
        news.propagate = False
    try:
        with quiet_once_nobody_reads():
            main()
        leave()
    except TrainingStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {stopped}", file=sys.stderr)
        leave()
        sys.exit(stopped.exit_code)
    except UserError as error:
        # an error in a data loader's worker comes with the worker's traceback; its last line is the message
        message = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else error
        if not error.of_all_processes or os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same call does what is not done yet", file=sys.stderr)
        sys.exit(130)


@contextmanager
def quiet_once_nobody_reads() -> Iterator[None]:
    """Ends the program as other tools end when `head` has read enough, with 141 and no traceback.

    One that fails ends as it does else: its message goes to stderr.
    """
    try:
        yield
    except BrokenPipeError:
        if written("\n"):
            raise  # of another pipe
        sys.exit(CLOSED_PIPE)
    except BaseException:
        written()
        raise
    if not written():
        sys.exit(CLOSED_PIPE)


def written(text: str = "") -> bool:
    """Write this, and all that waits to be written, as Python would at its end, where an error cannot be caught.

    Returns:
        Whether somebody reads it; if not, nothing is written any more.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def leave() -> None:
    """Take this process out of the group that trains together, where there is one."""
    if "torch.distributed" in sys.modules:  # it is not imported for that
        import_module("d3etr_hf.training.processes").leave_processes()


if __name__ == "__main__":
    main()
