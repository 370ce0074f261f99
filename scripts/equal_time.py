"""AP over seconds of a student alone and of the same student distilled, each with a full schedule per budget.

    python scripts/equal_time.py        # 3 seeds, 3 budgets: an hour and a half on two cores
    python scripts/equal_time.py --budgets 100 --seeds 0 --results runs/quick/results.jsonl --folder runs/quick

Makes the data, trains the strong teacher (25 minutes) and both students of every seed and budget, two runs at a time.
Each result is written as it arrives; called again it goes on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarking.equal_time import draw_budgets, format_budgets, run_budgets, summarise

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.main import run
from d3etr_hf.configurations import option


@dataclass
class EqualTimeArguments:
    """What to train, and where it goes."""

    results: str = option("model_cards/equal_time/results.jsonl", "Gets a line for each run; the plot lies beside it.")
    folder: str = option("runs/shapes", "Gets a folder for each run.")
    data_folder: str = option("data/shapes_8000", "Gets the synthetic data set.")
    budgets: list[int] = field(
        default_factory=lambda: [500, 1000, 2000], metadata={"help": "Steps of the distilled runs."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the students."})
    steps_ratio: float = option(1.6, "Steps of the student alone for each distilled step.")


def main() -> None:
    (arguments,) = parse_arguments([EqualTimeArguments], description=__doc__)
    results = Path(arguments.results)
    lines = run_budgets(
        results,
        Path(arguments.folder),
        Path(arguments.data_folder),
        arguments.budgets,
        arguments.seeds,
        arguments.steps_ratio,
    )
    draw_budgets(lines, results.with_name("ap_over_seconds.png"))
    print(format_budgets(summarise(lines)))


if __name__ == "__main__":
    run(main)
