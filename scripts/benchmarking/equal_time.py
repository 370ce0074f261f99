"""Distilled against alone at equal time: what either reaches with a schedule of its own in the same seconds.

Each budget is a whole training run of either kind. Two runs go side by side, one thread each, and those of a seed and
budget follow each other, so that a busy machine hits both alike; the student alone gets so many more steps that both
take about as long. The time that the teacher's training took is not counted.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from matplotlib.figure import Figure

from d3etr_hf.cli.demonstration import CONFIGURATIONS, stopping, train_one
from d3etr_hf.data.shapes import make_shapes

KINDS = ("alone", "distilled")
COLOURS = {"alone": "#D55E00", "distilled": "#0072B2"}
TRAIN_IMAGES = 8000


def run_budgets(
    results: Path, folder: Path, data_folder: Path, budgets: Sequence[int], seeds: Sequence[int], steps_ratio: float
) -> list[dict]:
    """Train the strong teacher and, for every seed and budget, both students; what is there already is not run again.

    Args:
        results: a file that gets one JSON line for each run as it ends.
        folder: gets a folder for every run.
        data_folder: gets the shapes.
        budgets: steps of the distilled runs.
        seeds: of the students; the teacher is the same for all.
        steps_ratio: how many steps the student alone takes for each distilled step.

    Returns:
        The lines: kind, seed, steps, seconds, AP and AP50 (0..1).

    Raises:
        DemoError: a run failed; the message names its log.
    """
    make_shapes(data_folder, train_images=TRAIN_IMAGES)
    data = ["--data_folder", str(data_folder)]
    teacher = folder / "strong_teacher"
    train_one(teacher.name, ["train", str(CONFIGURATIONS / "strong_teacher.yaml"), *data], folder)
    commands = {
        "alone": ["train", str(CONFIGURATIONS / "student.yaml"), *data],
        "distilled": ["distill", str(CONFIGURATIONS / "distill.yaml"), *data, "--teacher", str(teacher)],
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    lines, lock = read_lines(results), Lock()
    finished = {(line["kind"], line["seed"], line["steps"]) for line in lines}

    def train(kind: str, seed: int, steps: int) -> None:
        schedule = {"seed": seed, "max_steps": steps, "warmup_steps": steps // 10, "eval_strategy": "no"}
        options = [text for name, value in schedule.items() for text in (f"--{name}", str(value))]
        found = train_one(f"{kind}_{steps}_seed_{seed}", [*commands[kind], *options], folder)
        line = {"kind": kind, "seed": seed, "steps": steps}
        line |= {name: found[name] for name in ("seconds", "AP", "AP50")}
        with lock, results.open("a") as file:
            lines.append(line)
            file.write(json.dumps(line) + "\n")

    with ThreadPoolExecutor(max_workers=2) as pool, stopping(pool):
        runs = [
            pool.submit(train, kind, seed, steps)
            for budget in budgets
            for seed in seeds
            for kind, steps in (("distilled", budget), ("alone", round(budget * steps_ratio)))
            if (kind, seed, steps) not in finished
        ]
        for run in runs:
            run.result()
    return lines


def read_lines(results: Path) -> list[dict]:
    """The result lines of a file, none if it is not there."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def summarise(lines: list[dict]) -> list[dict]:
    """Kind and steps, with mean and standard deviation over seeds of AP and AP50, and the mean of the seconds."""
    rows = []
    for kind in KINDS:
        for steps in sorted({line["steps"] for line in lines if line["kind"] == kind}):
            runs = [line for line in lines if (line["kind"], line["steps"]) == (kind, steps)]
            rows.append(
                {
                    "kind": kind,
                    "steps": steps,
                    "seeds": len(runs),
                    "seconds": float(np.mean([run["seconds"] for run in runs])),
                    "AP": float(np.mean([run["AP"] for run in runs])),
                    "AP_deviation": float(np.std([run["AP"] for run in runs], ddof=len(runs) > 1)),
                    "AP50": float(np.mean([run["AP50"] for run in runs])),
                }
            )
    return rows


def format_budgets(rows: list[dict]) -> str:
    """The summary as a Markdown table, shortest runs first."""
    text = ["| student | steps | seconds | AP (± over seeds) | AP50 | seeds |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["seconds"]):
        text.append(
            f"| {row['kind']} | {row['steps']} | {row['seconds']:.0f} | "
            f"{100 * row['AP']:.1f} ± {100 * row['AP_deviation']:.1f} | {100 * row['AP50']:.1f} | {row['seeds']} |"
        )
    return "\n".join(text)


def draw_budgets(lines: list[dict], path: Path) -> None:
    """AP over seconds: every run a dot, the means over seeds joined by a line.

    A machine that others use is not equally fast at all times, so seconds are steps times the median seconds that a
    step of this kind took, over all runs.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    rows = summarise(lines)
    for kind in KINDS:
        runs = [line for line in lines if line["kind"] == kind]
        means = [row for row in rows if row["kind"] == kind]
        pace = float(np.median([run["seconds"] / run["steps"] for run in runs]))
        axes.plot([pace * row["steps"] for row in means], [100 * row["AP"] for row in means], color=COLOURS[kind])
        axes.scatter(
            [pace * run["steps"] for run in runs],
            [100 * run["AP"] for run in runs],
            color=COLOURS[kind],
            s=18,
            label=f"{kind}, {1e3 * pace:.0f} ms a step",
        )
    axes.set_xlabel("seconds of training at the median pace (one thread)")
    axes.set_ylabel("validation AP")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title="student", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
