"""What one D3ETR step costs for a public pair of each family, at its own resolution, with random weights.

    python scripts/family_steps.py
    python scripts/family_steps.py --pairs rt_detr d_fine --json family_steps.json

Two images, float32. Per pair, in processes of their own: seconds of the teacher's forward pass, of a step with two
query groups and no distillation, and of the full step, turn by turn; step / (teacher + two groups); and the peak
memory of full steps. One line a pair as it arrives. Nothing else should run meanwhile.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking.sizes import FAMILY_PAIRS
from benchmarking.steps import make_steps
from benchmarking.timing import peak_memory
from tqdm import tqdm

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.main import run
from d3etr_hf.configurations import option
from d3etr_hf.evaluation.timing import seconds_of

TIMED = ("teacher", "two groups", "step")


@dataclass
class FamilyStepArguments:
    """Which pairs, and how often."""

    pairs: list[str] = option(list(FAMILY_PAIRS), f"Of {', '.join(FAMILY_PAIRS)}.")
    rounds: int = option(3, "Rounds of the interleaved steps, after one that does not count.")
    threads: int = option(2, "Threads of each process.")
    json: str | None = option(None, "Gets all figures.")
    # what a process of its own is started with
    only: str = option("", "For the script itself: times, or memory.")


def main() -> None:
    (arguments,) = parse_arguments([FamilyStepArguments], description=__doc__)
    if unknown := sorted(set(arguments.pairs) - set(FAMILY_PAIRS)):
        raise ValueError(f"pairs: {unknown} are none of {list(FAMILY_PAIRS)}")
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        found = _times(arguments) if arguments.only == "times" else _memory(arguments)
        print(json.dumps(found))
        return
    print(f"{'pair':<18}{'teacher s':>10}{'two groups s':>14}{'step s':>8}{'ratio':>7}{'MiB':>8}")
    results = {}
    for pair in tqdm(arguments.pairs, desc="pairs"):
        found = _asked(arguments, pair, "times") | _asked(arguments, pair, "memory")
        found["ratio"] = found["step"] / (found["teacher"] + found["two groups"])
        results[pair] = found
        teacher, two_groups, step = (found[name] for name in TIMED)
        line = f"{pair:<18}{teacher:>10.2f}{two_groups:>14.2f}{step:>8.2f}{found['ratio']:>7.2f}{found['MiB']:>8.0f}"
        tqdm.write(line)
    if arguments.json is not None:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(results, indent=1))


def _asked(arguments: FamilyStepArguments, pair: str, only: str) -> dict[str, float]:
    """What a process of its own finds out."""
    options = ["--pairs", pair, "--only", only, "--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
    process = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"{pair}: measuring {only} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def _times(arguments: FamilyStepArguments) -> dict[str, float]:
    """Medians, in seconds."""
    steps = make_steps(FAMILY_PAIRS[arguments.pairs[0]], names=TIMED)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def _memory(arguments: FamilyStepArguments) -> dict[str, float]:
    step = make_steps(FAMILY_PAIRS[arguments.pairs[0]], names=("step",))["step"]
    for _ in range(2):
        step()
    return {"MiB": peak_memory()}


if __name__ == "__main__":
    run(main)
