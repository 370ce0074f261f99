"""Distil a small student on synthetic data, from start to finish, and print what it was worth.

    python scripts/demo.py

Stopped, it goes on where it was when it is called again; finished, it says so.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from d3etr_hf.errors import DemoError

# scripts/evaluate.py would hide the evaluate package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from d3etr_hf.cli.command_line import parse_arguments, run
from d3etr_hf.cli.demonstration import format_table, run_demo
from d3etr_hf.training.training_arguments import option


@dataclass
class DemoArguments:
    """Where the demonstration puts what it makes."""

    folder: str = option("runs/demo", "Gets the models, results.json and the pictures.")
    data_folder: str = option("data/shapes", "Gets the synthetic data set.")


def main() -> None:
    (arguments,) = parse_arguments([DemoArguments], description=__doc__)
    folder = Path(arguments.folder)
    print(format_table(run_demo(folder, Path(arguments.data_folder))))
    print(f"Pictures: {folder / 'detections.png'}, {folder / 'curves.png'}; table: {folder / 'results.json'}")
    print(f"Model card of the distilled student: {folder / 'distilled' / 'README.md'}")


if __name__ == "__main__":
    run(main, (DemoError,))
