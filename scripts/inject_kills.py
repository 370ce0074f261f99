"""Kills trainings at chosen moments, lets each go on, and compares what it ends with bit by bit with one left alone.

    python scripts/inject_kills.py              # 40 kills: 5 phases, one and two processes
    python scripts/inject_kills.py --each 1     # 10: one of each phase and number of processes

A kill is SIGKILL for all processes of a run at once, its data loaders' workers too, at a random moment within a phase:
a training step, an evaluation, the saving of a checkpoint, the removal of old ones, the final evaluation and saving.
Half of those of a phase come before the run has any checkpoint, where the phase allows it. Runs are distilled with
dropout and augmentation, two workers a process. Ends with exit code 1 where weights, log or AP differ.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are the tests'

import torch
from tqdm.auto import tqdm

from d3etr_hf.cli import training_run
from d3etr_hf.data import DataArguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training import resumable_trainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import tiny_config, tiny_model

SIDE, STEPS, SAVED_EVERY = 64, 8, 2
# end the names of what a log tells of time, and of the steps since a run went on
OF_ONE_CALL = ("runtime", "per_second", "train_loss")
# by phase: whose function, its name, at which of its calls the early and the late kills come
PHASES = {
    "step": (D3etrTrainer, "training_step", (1, 2), (3, 5, 8)),
    "evaluation": (D3etrTrainer, "evaluation_loop", (1,), (2, 3)),
    "save": (D3etrTrainer, "_save_checkpoint", (1,), (2, 3, 4)),
    "rotation": (resumable_trainer, "rotate_checkpoints", (2,), (3, 4)),
    "final save": (training_run, "finish", (1,), (1,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="kills of each phase and number of processes")
    parser.add_argument("--phase", choices=PHASES, help="only this one")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        bad = inject(Path(place), chosen.each, [chosen.phase] if chosen.phase else list(PHASES))
    sys.exit(1 if bad else 0)


def inject(place: Path, each: int, phases: list[str]) -> int:
    """How many of the kills left a trace; a line for each is printed."""
    random.seed(0)
    make_shapes(place / "data", 24, 6, image_size=SIDE, progress=False)
    tiny_model(seed=1).save_pretrained(place / "teacher")
    load_image_processor(None, SIDE, SIDE).save_pretrained(place / "teacher")
    cases = [(n, phase, k) for n in (1, 2) for phase in phases for k in range(each)]
    references, seconds = {}, {}
    same = 0
    for processes, phase, number in tqdm(cases, desc="kills", unit="kill"):
        early = number % 2 == 0
        saves = not (phase == "final save" and early)  # the only way to end without a checkpoint
        key = processes, saves
        if key not in references:
            references[key] = place / f"reference_{processes}_{saves}"
            seconds[key] = launch(place, references[key], processes, saves)
        output = place / "killed"
        shutil.rmtree(output, ignore_errors=True)
        call = random.choice(PHASES[phase][2 if early else 3])
        delay = random.random() * seconds[key].get(phase, 0.1)
        killed = launch(place, output, processes, saves, (phase, call, delay)) is None
        left = sorted(path.name for path in output.glob("checkpoint-*"))
        launch(place, output, processes, saves)
        differs = difference(output, references[key])
        same += killed and not differs
        tqdm.write(
            f"{processes} process(es), {phase}, call {call}, after {1000 * delay:.0f} ms, "
            f"{left or 'no checkpoint'}: {differs or ('the same' if killed else 'was not killed')}"
        )
    print(f"{same} of {len(cases)} the same bit by bit")
    return len(cases) - same


def launch(place: Path, output: Path, processes: int, saves: bool, kill: tuple | None = None) -> dict | None:
    """Run or go on with a training; the longest seconds of each phase, or None where it was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            if processes > 1:
                os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            train(place, output, saves, kill)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if set(codes) == {0}:
        return json.loads((output / "phases.json").read_text())
    if kill is None or -signal.SIGKILL not in codes:
        raise SystemExit(f"a training failed with {codes}: {(output.parent / 'log').read_text()[-3000:]}")
    return None


def train(place: Path, output: Path, saves: bool, kill: tuple | None) -> None:
    """What a process of the launch does; never returns."""
    log = os.open(place / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    status = 1
    try:
        seconds = watch_phases(kill)
        config = tiny_config(dropout=0.1).to_dict()
        names = ("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
        names += ("encoder_ffn_dim", "decoder_ffn_dim", "num_queries", "dropout")
        backbone = {"model_type": "convnext", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
        backbone |= {"out_features": ["stage2"], "layer_scale_init_value": 1.0}
        training_run.train_detector(
            ModelArguments(model_config={name: config[name] for name in names} | {"backbone_config": backbone}),
            TeacherArguments(teacher=str(place / "teacher")),
            DataArguments(data_folder=str(place / "data"), short_side=SIDE, long_side=SIDE, augmentation="paper"),
            D3etrTrainingArguments(
                output_dir=str(output),
                max_steps=STEPS,
                per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
                per_device_eval_batch_size=2,
                learning_rate=1e-3,
                backbone_learning_rate=1e-3,
                eval_strategy="steps",
                eval_steps=SAVED_EVERY,
                save_strategy="steps" if saves else "no",
                save_steps=SAVED_EVERY,
                save_total_limit=1,
                logging_steps=1,
                dataloader_num_workers=2,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
        )
        if os.environ.get("RANK", "0") == "0":
            (output / "phases.json").write_text(json.dumps(seconds))
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch_phases(kill: tuple | None) -> dict[str, float]:
    """Time each phase, by name, and have this process's group killed at one call of one."""
    seconds: dict[str, float] = {}
    for phase, (owner, name, _, _) in PHASES.items():
        setattr(owner, name, watched(getattr(owner, name), phase, kill, seconds))
    return seconds


def watched(function, phase: str, kill: tuple | None, seconds: dict[str, float]):
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if kill is not None and kill[:2] == (phase, calls) and os.environ.get("RANK", "0") == "0":
            threading.Timer(kill[2], os.killpg, (os.getpgid(0), signal.SIGKILL)).start()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[phase] = max(seconds.get(phase, 0), time.perf_counter() - start)
        return result

    return call


def difference(output: Path, reference: Path) -> str:
    """What of a finished run is not as in another."""
    if (output / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        return "other weights"
    results = [json.loads((folder / "results.json").read_text()) for folder in (output, reference)]
    if any(results[0][name] != results[1][name] for name in ("AP", "AP50", "steps")):
        return "other results"
    logs = [json.loads((folder / "log_history.json").read_text()) for folder in (output, reference)]
    for own, wanted in zip_longest(*logs, fillvalue={}):
        names = sorted(name for name in own.keys() | wanted.keys() if not name.endswith(OF_ONE_CALL))
        if other := [name for name in names if own.get(name) != wanted.get(name)]:
            return f"another log: {other[0]} is {own.get(other[0])} instead of {wanted.get(other[0])}"
    return ""


if __name__ == "__main__":
    main()
