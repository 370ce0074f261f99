"""What the probe before the first step says of memory and time, against what came.

    python scripts/probe_accuracy.py
    python scripts/probe_accuracy.py --sizes small --steps 100

Trainings with random weights, each in a process of its own, alone and with a teacher. After the probe they take some
steps; peak memory is that of these steps, seconds are their mean, waiting for images included. A line each as it
arrives. Nothing else should run meanwhile.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from benchmarking.sizes import SIZES, Size, make_detector
from benchmarking.timing import peak_memory
from transformers import TrainerCallback

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.main import run
from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.step_probe import Forecast, forecast
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

# of shapes on a white ground, and of photographs; with DETR's multiscale augmentation all of them
TRIED: dict[str, tuple[Size, dict]] = {
    "small": (SIZES["shapes"], {"short_side": 96, "long_side": 96, "augmentation": "flip"}),
    "middle": (replace(SIZES["shapes"], batch=8), {"short_side": 192, "long_side": 192}),
    "real": (SIZES["real"], {"short_side": 400, "long_side": 533}),
}
UNCOUNTED = 2


@dataclass
class ProbeAccuracyArguments:
    """Which sizes, and how long."""

    sizes: list[str] = option(list(TRIED), f"Of {', '.join(TRIED)}.")
    steps: int = option(0, "Steps after the probe; 0: 60 of the small, 40 of the middle, 30 of the real size.")
    photographs: str = option("../shared/data/coco_mini", "COCO folder for the real size.")
    threads: int = option(1, "Threads of each process.")
    workers: int = option(0, "Workers that load images.")
    cpu_seconds: bool = option(False, "Count this process's CPU seconds, for a machine with other work; one thread.")
    json: str | None = option(None, "Gets all figures.")
    # what a process of its own is started with
    only: str = option("", "For the script itself: alone, or distilled.")


class Measured(TrainerCallback):
    """The probe's forecast, and the seconds and peak memory of the steps after it."""

    forecast: Forecast

    def __init__(self, trainer: D3etrTrainer) -> None:
        self.trainer = trainer
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        began = time.perf_counter()
        self.forecast = forecast(self.trainer)
        self.probe_seconds = time.perf_counter() - began
        if self.trainer.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux's high-water mark starts from here

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        self.peak = peak_memory() * 2**20

    @property
    def seconds(self) -> float:
        """Of a step; the first ones allocate."""
        counted = self.times[UNCOUNTED:]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def main() -> None:
    (arguments,) = parse_arguments([ProbeAccuracyArguments], description=__doc__)
    if unknown := sorted(set(arguments.sizes) - set(TRIED)):
        raise ValueError(f"sizes: {unknown} are none of {list(TRIED)}")
    if arguments.only:
        print(json.dumps(_measured(arguments)))
        return
    print(f"{'':<20}{'GiB said':>10}{'came':>7}{'ratio':>7}{'s said':>9}{'came':>8}{'ratio':>7}{'probe, steps':>14}")
    results = {}
    for size in arguments.sizes:
        for kind in ("alone", "distilled"):
            found = results[f"{size}, {kind}"] = _asked(arguments, size, kind)
            memory, seconds = (found["said"][name] for name in ("peak", "step_seconds"))
            print(
                f"{size + ', ' + kind:<20}{memory / 2**30:>10.2f}{found['peak'] / 2**30:>7.2f}"
                f"{memory / found['peak']:>7.2f}{seconds:>9.3f}{found['seconds']:>8.3f}"
                f"{seconds / found['seconds']:>7.2f}{found['probe_seconds'] / found['seconds']:>14.1f}",
                flush=True,
            )
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


def _asked(arguments: ProbeAccuracyArguments, size: str, kind: str) -> dict:
    """What a process of its own finds out."""
    options = asdict(arguments) | {"sizes": size, "only": kind}
    flags = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
    process = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"{size}, {kind} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def _measured(arguments: ProbeAccuracyArguments) -> dict:
    torch.set_num_threads(arguments.threads)
    if arguments.cpu_seconds:
        time.perf_counter = time.process_time
    (name,) = arguments.sizes
    size, data = TRIED[name]
    steps = arguments.steps or {"small": 60, "middle": 40, "real": 30}[name]
    with tempfile.TemporaryDirectory() as folder:
        if name == "real":
            images = arguments.photographs
        else:
            images = make_shapes(Path(folder) / "shapes", 200, 4, image_size=data["short_side"], progress=False)
        processor = load_image_processor(None)
        train, val = load_splits(DataArguments(data_folder=str(images), **data), processor)
        distilled = arguments.only == "distilled"
        plain = {} if distilled else {"auxiliary_queries": "none", "adaptive_matching": False}
        trainer = D3etrTrainer(
            make_detector(size.student, size, 1, train.class_names),
            D3etrTrainingArguments(
                f"{folder}/run",
                max_steps=steps,
                per_device_train_batch_size=size.batch,
                dataloader_num_workers=arguments.workers,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **plain,
            ),
            teacher=make_detector(size.teacher, size, 0, train.class_names) if distilled else None,
            train_dataset=train,
            eval_dataset=val,
            processing_class=processor,
        )
        measured = Measured(trainer)
        trainer.add_callback(measured)
        trainer.train()
    return {
        "said": asdict(measured.forecast),
        "peak": measured.peak,
        "seconds": measured.seconds,
        "probe_seconds": measured.probe_seconds,
    }


if __name__ == "__main__":
    run(main)
