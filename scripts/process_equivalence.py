"""One training on any number of processes: how far 2 x 4, 4 x 2 and 1 x 2 x 4 accumulated are from 1 x 8.

    python scripts/process_equivalence.py                                   # every family: minutes
    python scripts/process_equivalence.py --families detr rf_detr --json differences.json
    python scripts/process_equivalence.py --launchers                       # two, a process each, against one

Tiny models, a teacher and the default terms; batch norm as in evaluation, denoising queries and D-FINE's
self-distillation off, for these differ by nature; SGD, for AdamW divides the rounding of gradients that are zero (of
biases of attention's keys) by itself. Three optimizer steps of eight images: images of no to four objects; a first
half, and so a process, without any; none in the whole step. The figures are the largest of all steps: of the loss
terms, each over the whole loss; of the gradient, norm over norm; and of what the weights have changed in the end.
Terms that are divided by what is known one batch at a time (`Shares`) cannot be exact where batches are accumulated:
those are marked.
Ends with exit code 1 where anything else differs by more than 2e-5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are the tests'

from transformers import PrinterCallback, TrainerCallback

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.memory_methods import MEMORY_METHODS
from tests.distributed_worker import NOTHING_DRAWN, freeze_statistics, in_processes
from tests.shapes_fixture import SIDE, keep_objects, load_shapes, shapes_trainer, weights_of
from tests.tiny import small_image_processor, tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
IMAGES, TOLERANCE = 8, 2e-5
OBJECTS = [4, 0, 2, 1, 3, 1, 4, 2] + [0, 0, 0, 0, 3, 0, 1, 4] + [0] * IMAGES
# processes and accumulated batches of each; the first is what the others are compared with
LAYOUTS = {"1 x 8": (1, 1), "2 x 4": (2, 1), "4 x 2": (4, 1), "1 x 2 x 4": (1, 4)}


@dataclass
class Case:
    """What is trained; `approximate`: some term is not exact where batches are accumulated."""

    family: str
    options: dict = field(default_factory=dict)
    approximate: bool = False


CASES = {family: Case(family) for family in FAMILIES}
# boxes are counted by the union of what all layers assign
CASES |= {family: Case(family, approximate=True) for family in ("d_fine", "deimv2")}
CASES |= {
    f"{family}, normaliser boxes": Case(family, {"prediction_normaliser": "boxes"}, approximate=True)
    for family in ("conditional_detr", "detr")
}
DRAWN = "icd"  # whose instances every process draws
MEMORIES = {f"{method}_weight": 1.0 for method in MEMORY_METHODS if method != DRAWN}
CASES["rt_detr, encoder memories"] = Case("rt_detr", MEMORIES)
CASES["d_fine, box distributions"] = Case("d_fine", {"box_distribution_weight": 1.0}, approximate=True)


class KeepSteps(TrainerCallback):
    """Copies loss terms and gradients of every step."""

    def __init__(self) -> None:
        self.terms: list[dict[str, float]] = []
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]).clone())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.terms.append({name: value for name, value in logs.items() if name.startswith("loss/")})


def train(case: Case, folder: Path, processes: int, accumulated: int) -> dict:
    """One training: terms and gradients by step, and the weights it ends with."""
    changes, keeper = NOTHING_DRAWN.get(case.family, {}), KeepSteps()
    student = tiny_model(2, case.family, **changes)
    freeze_statistics(student)
    trainer = shapes_trainer(
        folder / "shapes",
        folder / "run",
        student=student,
        teacher=tiny_model(1, case.family, **changes),
        train=load_shapes(folder / "shapes", "train", family=case.family),
        callbacks=[keeper],
        max_steps=len(OBJECTS) // IMAGES,
        max_grad_norm=0.0,
        optim="sgd",
        optim_args="momentum=0.9",
        per_device_train_batch_size=IMAGES // processes // accumulated,
        gradient_accumulation_steps=accumulated,
        train_sampling_strategy="sequential",
        **case.options,
    )
    trainer.remove_callback(PrinterCallback)
    before = weights_of(trainer.model)
    trainer.train()
    return {"terms": keeper.terms, "gradients": keeper.gradients, "weights": weights_of(trainer.model) - before}


def train_all(folder: Path, processes: int, cases: list[str]) -> dict:
    """What one of so many processes does: by layout and case, what came of it."""
    of_these = {name: layout for name, layout in LAYOUTS.items() if layout[0] == processes}
    return {name: {case: train(CASES[case], folder, *of_these[name]) for case in cases} for name in of_these}


def differences(found: dict, reference: dict) -> dict[str, float]:
    """The largest relative ones over steps, of loss terms, gradient and weights."""
    terms = [
        abs(other[name] - value) / sum(one.values())
        for one, other in zip(reference["terms"], found["terms"], strict=True)
        for name, value in one.items()
    ]
    gradients = map(relative, found["gradients"], reference["gradients"])
    weights = relative(found["weights"], reference["weights"])
    return {"loss": max(terms), "gradient": max(gradients), "weights": weights}


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def compare_launchers(folder: Path) -> float:
    """How far the student of two launchers is from that of one with two processes; 0: bit by bit the same."""
    make_shapes(folder / "data", 16, 3, image_size=SIDE, progress=False)
    for seed, name in ((1, "teacher"), (2, "student")):
        tiny_model(seed).save_pretrained(folder / name)
        small_image_processor().save_pretrained(folder / name)
    options = f"--teacher {folder}/teacher --model {folder}/student --data_folder {folder}/data --max_steps 6 "
    options += "--per_device_train_batch_size 2 --save_strategy no --report_to none --use_cpu true --disable_tqdm true"
    together = "--num_machines 2 --main_process_ip 127.0.0.1 --main_process_port 29711 --machine_rank"
    for output, launchers in (
        ("one", ["--num_machines 1 --main_process_port 0"]),
        ("two", [f"{together} 0", f"{together} 1"]),
    ):
        called = [
            f"launch --multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend no {launcher} "
            f"scripts/distill.py {options} --output_dir {folder}/{output}"
            for launcher in launchers
        ]
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        running = [subprocess.Popen([*program, *words.split()], cwd=REPOSITORY, env=ENVIRONMENT) for words in called]
        if any([process.wait() for process in running]):
            sys.exit(f"{output}: a launcher failed")
    one, two = (load_file(folder / output / "model.safetensors") for output in ("one", "two"))
    return max(float((two[name] - value).abs().max()) for name, value in one.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="by default all")
    parser.add_argument("--json", type=Path, help="gets all figures")
    parser.add_argument("--launchers", action="store_true", help="compare launchers instead")
    chosen = parser.parse_args()
    if chosen.launchers:
        with tempfile.TemporaryDirectory() as folder:
            difference = compare_launchers(Path(folder))
        print(f"two launchers against one with two processes: largest difference of a weight {difference:.1e}")
        sys.exit(int(difference > 1e-6))
    cases = [name for name, case in CASES.items() if case.family in chosen.families]
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        shapes = make_shapes(Path(folder) / "shapes", len(OBJECTS), 2, image_size=SIDE, progress=False)
        keep_objects(shapes, "train", OBJECTS)
        for processes in sorted({processes for processes, _ in LAYOUTS.values()}):
            found |= in_processes(processes, train_all, Path(folder), processes, cases)
    reference, *others = LAYOUTS
    table = {case: {n: differences(found[n][case], found[reference][case]) for n in others} for case in cases}
    print(f"| against {reference}: loss / gradient / weights | {' | '.join(others)} |\n|---|{'---|' * len(others)}")
    worst = 0.0
    for case, row in table.items():
        shown = []
        for name, values in row.items():
            inexact = CASES[case].approximate and LAYOUTS[name][1] > 1
            worst = max(worst, 0.0 if inexact else max(values.values()))
            shown.append(" / ".join(f"{value:.0e}" for value in values.values()) + " (approximate)" * inexact)
        print(f"| {case} | {' | '.join(shown)} |")
    print(f"\nlargest of what is exact: {worst:.1e}")
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=2) + "\n")
    sys.exit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()
