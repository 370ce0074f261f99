"""COCO average precision of a detector, ours or any Conditional DETR checkpoint.

    accelerate launch scripts/evaluate.py --model runs/demo/distilled --data_folder data/shapes

Prints every metric and writes it to evaluation.json in --output_dir.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

# scripts/evaluate.py would hide the evaluate package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]


from d3etr_hf.cli.command_line import parse_arguments, run
from d3etr_hf.cli.training_run import USER_ERRORS, evaluate_detector
from d3etr_hf.data import DataArguments
from d3etr_hf.training.training_arguments import option


@dataclass
class EvaluationArguments:
    """What to evaluate, and where the result goes."""

    model: str = field(metadata={"help": "The detector: a folder or Hub id."})
    output_dir: str = option("runs/evaluation", "Gets evaluation.json.")
    batch_size: int = option(8, "Images per device; predictions depend a little on which images share a batch.")
    workers: int = option(0, "Processes that load images, per device.")
    use_cpu: bool = option(False, "Do not use a GPU.")


def main() -> None:
    arguments, data = parse_arguments((EvaluationArguments, DataArguments), description=__doc__)
    metrics = evaluate_detector(data, **vars(arguments))
    for name, value in metrics.items() if os.environ.get("RANK", "0") == "0" else ():
        print(f"{name:<28}{value:.4f}")


if __name__ == "__main__":
    run(main, USER_ERRORS)
