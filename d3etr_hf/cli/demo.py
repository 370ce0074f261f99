"""Distil a small student on synthetic data, from start to finish, and print what it was worth.

    d3etr demo
    d3etr demo --train_teacher true   # the teacher, too: half an hour more

Stopped, it goes on where it was when it is called again; finished, it says so.
"""

from dataclasses import dataclass
from pathlib import Path

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.demonstration import format_table, run_demo
from d3etr_hf.configurations import option


@dataclass
class DemoArguments:
    """Where the demonstration puts what it makes."""

    folder: str = option("runs/demo", "Gets the models, results.json and the pictures.")
    data_folder: str = option("data/shapes", "Gets the synthetic data set.")
    train_teacher: bool = option(False, "Train the teacher, too, instead of taking the one of the package.")


def main() -> None:
    """What `d3etr demo` runs."""
    (arguments,) = parse_arguments([DemoArguments], description=__doc__)
    folder = Path(arguments.folder)
    print(format_table(run_demo(folder, Path(arguments.data_folder), arguments.train_teacher)))
    print(f"Pictures: {folder / 'detections.png'}, {folder / 'curves.png'}; table: {folder / 'results.json'}")
    print(f"Model card of the distilled student: {folder / 'distilled' / 'README.md'}")
