"""What a D3ETR step costs, beside the parts it cannot do without.

    python scripts/benchmark.py --size shapes
    python scripts/benchmark.py --size real --rounds 8 --json benchmark.json
    python scripts/benchmark.py --growth true --json growth.json

Measures, turn by turn in one process: a plain training step of the stock model, the teacher's forward pass, a step of
the student with two query groups and no distillation, and the full step. floor = teacher + two groups. Then the parts
of a step, the peak memory of each (in processes of their own), costs and losses against a public-style loop over
layers and images, the wait for real images, and COCO evaluation. Nothing else should run meanwhile.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from benchmarking.growth import draw_growth, format_growth, growth_curves
from benchmarking.report import (
    describe,
    format_report,
    measure_parts,
    measure_public_loop,
    measure_steps,
    measure_surroundings,
)
from benchmarking.sizes import SIZES, on_gpu

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.main import run
from d3etr_hf.configurations import option


@dataclass
class BenchmarkArguments:
    """What to measure."""

    size: Literal["shapes", "real"] = option("shapes", "The demo's models, or R101 to R50 at 480x640 (GPU: 800x1066).")
    rounds: int = option(30, "Rounds of the interleaved steps.")
    precision: Literal["no", "fp16", "bf16"] = option("no", "Mixed precision.")
    public_loop: str = option("../shared/reference/public_loop.py", "The slow loop's file.")
    data_folder: str = option("../shared/data/coco_mini", "Real images in COCO format.")
    growth: bool = option(False, "Measure instead how the parts grow with queries, batch, layers and classes.")
    steps_alone: bool = option(False, "Leave out peak memory, the public loop, the wait for data and evaluation.")
    json: str | None = option(None, "Gets all figures; the growth curves' picture lies beside it.")


def main() -> None:
    (arguments,) = parse_arguments([BenchmarkArguments], description=__doc__)
    target = Path(arguments.json) if arguments.json else None
    if arguments.growth:
        found = growth_curves(precision=arguments.precision)
        print(format_growth(found))
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            draw_growth(found, target.with_suffix(".png"))
    else:
        size = SIZES[arguments.size]
        if torch.accelerator.is_available():
            size = on_gpu(size)
        found = describe(size, arguments.precision)
        public_loop = Path(arguments.public_loop)
        # first: later the process's memory is in pieces, which slows either side by another factor
        if not arguments.steps_alone:
            found |= measure_public_loop(public_loop)
        found |= measure_steps(size, arguments.precision, arguments.rounds)
        found |= measure_parts(size, arguments.precision, arguments.rounds, found)
        if not arguments.steps_alone:
            with_evaluation = arguments.size == "real"
            found |= measure_surroundings(size, arguments.precision, arguments.data_folder, found, with_evaluation)
        print(format_report(found))
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
