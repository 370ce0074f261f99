"""What the two-process tests run: `python distributed_worker.py FOLDER OUTPUT.pt`.

Takes one training step per case, all in one process group, from the checkpoint in the folder; the main process writes
gradients, log and, of the first case, metrics. `run_cases(FOLDER, 1)` does the same in the calling process.
"""

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3etr_hf.models.loading import FAMILIES, load_detector  # noqa: E402
from d3etr_hf.models.memory_methods import MEMORY_METHODS  # noqa: E402
from d3etr_hf.training.heartbeat import watching_processes  # noqa: E402
from d3etr_hf.training.step_probe import StepProbe  # noqa: E402
from tests.shapes_fixture import load_shapes, shapes_trainer, weights_of  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402
from tests.training.test_resuming import train  # noqa: E402


@dataclass
class Case:
    """One step on the same images however many processes share them.

    Attributes:
        family: the `model_type` of student and teacher.
        images: of the whole step; each process takes its part at once, or in `accumulated` batches.
        options: training arguments.
        split_options: more of them, that only several processes are given.
        teacher: changes of the tiny teacher's configuration.
        data: the data set's folder within the working folder.
        rows: rows of the training split, by default all.
        unlabeled: rows of it that come as images without labels, between those of `rows`, in order.
        evaluates: whether the checkpoint is evaluated before the step.
        as_trained: batch norm over each process's own images; else as in evaluation, where images do not mix.
    """

    family: str = "conditional_detr"
    images: int = 4
    options: dict = field(default_factory=dict)
    accumulated: int = 1
    split_options: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)
    data: str = "shapes"
    rows: list[int] | None = None
    unlabeled: list[int] | None = None
    evaluates: bool = False
    as_trained: bool = False


# means over pairs; weighted by class; over unions of assignments, and weighted by the teacher's scores
UNEVEN: dict[str, dict] = {
    "conditional_detr": {"log_gradient_norms": True},
    "detr": {},
    "d_fine": {"prediction_normaliser": "boxes", "box_distribution_weight": 1.0},
}
# all methods that compare encoder memories, but the one that draws instances
MEMORIES = {f"{method}_weight": 1.0 for method in MEMORY_METHODS if method != "icd"}
IN_ORDER = {"train_sampling_strategy": "sequential"}
CASES = {
    "pairs": Case(evaluates=True),
    **{family: Case(family=family) for family in FAMILIES if family != "conditional_detr"},
    "boxes": Case(options={"prediction_normaliser": "boxes"}),
    "accumulated batches": Case(accumulated=2),
    "gradient checkpointing": Case(split_options={"gradient_checkpointing": True}),
    "learned queries": Case(
        options={
            "auxiliary_queries": "learned",
            "auxiliary_groups": 2,
            "one_to_many_queries": 10,
            "one_to_many_repeats": 2,
        }
    ),
    "confident pairs": Case(
        options={
            "matching_score_threshold": 0.0125,
            "logits_distillation_weight": 1.0,
            "logits_negative_weight": 0.5,
            "denoising_groups": 2,
        }
    ),
    "shared queries": Case(
        options={
            "auxiliary_queries": "none",
            "shared_query_weight": 1.0,
            "shared_random_queries": 5,
            "shared_object_queries": True,
        },
        teacher={"d_model": 48},
    ),
    "projected queries": Case(teacher={"d_model": 48}),
    "memories": Case(options=MEMORIES, accumulated=2, teacher={"d_model": 48}, data="sparse", rows=[0, 1, 2, 3]),
    "memories of several levels": Case("rt_detr", options=MEMORIES),
    "no object": Case(images=2, data="sparse", rows=[0, 1]),
    "one object": Case(images=2, data="sparse", rows=[2, 3], options={"denoising_groups": 2}),
    # each process has both, or one of them has only images without labels
    "images without labels": Case(rows=[0, 1], unlabeled=[2, 3], options=IN_ORDER),
    **{
        f"{family}, one image with labels": Case(family, rows=[0], unlabeled=[1, 2, 3], options=IN_ORDER)
        for family in ("detr", "d_fine")
    },
    # the last step of an epoch: one process has four images and the other the fifth, or none is left for the other
    **{f"{family}, five images": Case(family, 8, rows=[0, 1, 2, 3, 4]) for family in UNEVEN},
    **{f"{family}, three images": Case(family, 8, UNEVEN[family], rows=[0, 1, 2]) for family in UNEVEN},
}


# evaluated after their step instead of compared: processes draw their own denoising queries and statistics
AS_TRAINED = {
    "RT-DETR as trained": Case(family="rt_detr", as_trained=True),
    # one of the processes has an object to make denoising queries of, the other none
    "RT-DETR as trained, one object": Case(family="rt_detr", as_trained=True, images=2, data="sparse", rows=[2, 3]),
}
# families that draw queries in training: without them a step is the same on any number of processes
NOTHING_DRAWN: dict[str, dict] = {"rt_detr": {"num_denoising": 0}, "rt_detr_v2": {"num_denoising": 0}}
# and without D-FINE's self-distillation, a mean over each process's own batch, which does not add up
NOTHING_DRAWN |= dict.fromkeys(("d_fine", "deimv2"), {"num_denoising": 0, "weight_loss_ddf": 0.0})


class KeepGradients(TrainerCallback):
    """Copies the gradients before the first optimizer step."""

    gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {
                name.removeprefix("module."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }


def run_case(case: Case, folder: Path, run: Path, processes: int) -> dict:
    """One step of one case."""
    keeper = KeepGradients()
    accumulated = case.accumulated if processes > 1 else 1
    options = case.options | (case.split_options if processes > 1 else {})
    student = load_detector(str(folder / (f"{case.family} as trained" if case.as_trained else case.family)))
    if not case.as_trained:
        freeze_statistics(student)
    train = None
    if case.rows is not None:
        whole = load_shapes(folder / case.data, "train", family=case.family)
        train = whole.select(case.rows)
        if case.unlabeled is not None:
            train = train.with_unlabeled(whole.select(case.unlabeled), len(case.unlabeled) / len(case.rows))
    trainer = shapes_trainer(
        folder / case.data,
        run,
        student=student,
        teacher=tiny_model(1, case.family, **case.teacher),
        train=train,
        callbacks=[keeper],
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=case.images // processes // accumulated,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulated,
        **options,
    )
    metrics = trainer.evaluate() if case.evaluates else {}
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    if case.as_trained:
        metrics = trainer.evaluate()
    statistics = torch.cat([b.flatten().double() for b in student.buffers()]) if case.as_trained else torch.zeros(1)
    spread = trainer.accelerator.gather(statistics[None])
    spread = float((spread - spread[0]).abs().max())
    return {"metrics": metrics, "gradients": keeper.gradients, "log": log, "spread": spread}


def freeze_statistics(model: torch.nn.Module) -> None:
    """Batch norm as in evaluation, whatever the trainer asks for."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


class AskOne(TrainerCallback):
    """Asks the last process alone to stop, after the first step."""

    stop = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            self.stop.asked = True


def run_stop(folder: Path, processes: int) -> list:
    """After which step each process stopped, and the checkpoints there are."""
    caller, run = AskOne(), folder / f"stop on {processes}"
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "eval_strategy": "epoch"}
    trainer = shapes_trainer(folder / "shapes", run, teacher=None, callbacks=[caller], **options)
    caller.stop = trainer.stop
    trainer.train()
    assert trainer.stop.stopped
    steps = trainer.accelerator.gather(torch.tensor([trainer.state.global_step])).tolist()
    return [*steps, *(path.name for path in run.glob("checkpoint-*"))]


class StopAfterTwo(TrainerCallback):
    """Ends a training after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def run_probe(folder: Path, processes: int) -> list[list]:
    """Of every process: lines that a probe prints, and sums of what two steps make of a student with and without."""
    found = []
    for probe in (True, False):
        trainer = shapes_trainer(
            folder / "shapes",
            folder / f"probe {probe} on {processes}",
            student=load_detector(str(folder / "rt_detr as trained")),
            teacher=tiny_model(1, "rt_detr"),
            callbacks=[StopAfterTwo()],
            max_steps=60,
            per_device_train_batch_size=2,
            probe=probe,
        )
        trainer.add_callback(StepProbe(trainer))
        with redirect_stdout(StringIO()) as printed:
            trainer.train()
        lines = sum(
            line.startswith(("a step takes", "peak memory", "largest")) for line in printed.getvalue().split("\n")
        )
        left = [tensor.double().sum() for tensor in (*trainer.model.parameters(), *trainer.model.buffers())]
        found.append(trainer.accelerator.gather(torch.stack([torch.tensor(float(lines)), *left])[None]).tolist())
    return found


def run_resume(folder: Path, processes: int) -> list[bool]:
    """Whether each process has the same weights after a run that was killed within an epoch and went on."""
    whole, killed = (folder / f"{name} on {processes}" for name in ("whole", "killed"))
    expected = weights_of(train(folder / "shapes", whole, 4).model)
    train(folder / "shapes", killed, 4, stop=2)
    resumed = train(folder / "shapes", killed, 4, resume=str(killed / "checkpoint-2"))
    same = resumed.state.global_step == 4 and torch.equal(weights_of(resumed.model), expected)
    return gather_object([same]) if processes > 1 else [same]


def run_planned(folder: Path, processes: int) -> list[dict]:
    """The log of a training with steps of which the adapter of a wider teacher's queries has no part."""
    trainer = shapes_trainer(
        folder / "shapes",
        folder / f"planned on {processes}",
        student=load_detector(str(folder / "conditional_detr")),
        teacher=tiny_model(1, d_model=48),
        max_steps=4,
        per_device_train_batch_size=4 // processes,
        distillation_interval=2,
        distillation_decay=True,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run_silence(processes: int) -> tuple | None:
    """What the others say while a process is stopped, one after the other; of threads, how many are left."""
    if processes == 1:
        return None
    said: list[str] = []
    handler, state, before = logging.Handler(), PartialState(), threading.active_count()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("d3etr_hf.training.heartbeat").addHandler(handler)
    pids = gather_object([os.getpid()])
    with watching_processes(60, interval=0.15):
        for stopped in (1, 0):
            state.wait_for_everyone()
            if state.process_index != stopped:
                os.kill(pids[stopped], signal.SIGSTOP)
                for words in (f"rank {stopped}.* has not answered for 1 s", f"rank {stopped}.* answers again"):
                    end = time.monotonic() + 30
                    while not any(re.match(words, each) for each in said) and time.monotonic() < end:
                        time.sleep(0.1)
                    os.kill(pids[stopped], signal.SIGCONT)
    return gather_object(said), gather_object([threading.active_count() - before])


def run_cases(folder: Path, processes: int) -> dict:
    """All cases, a training that is stopped, one with a plan, one with a probe, and processes that are stopped."""
    cases = CASES | AS_TRAINED
    found = {
        name: run_case(case, folder, folder / f"{name} on {processes}", processes) for name, case in cases.items()
    }
    found |= {"stop": run_stop(folder, processes), "resume": run_resume(folder, processes)}
    found["planned"] = run_planned(folder, processes)
    return found | {"probe": run_probe(folder, processes), "silence": run_silence(processes)}


def in_processes(count: int, work: Callable, *arguments) -> Any:
    """What `work(*arguments)` returns in the first of so many forks of this process, which form one process group.

    What is imported is imported once; this process must not have computed anything by threads.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        output = Path(folder) / "results.pt"
        torch.multiprocessing.start_processes(
            _one_process, (count, port, output, work, arguments), nprocs=count, start_method="fork"
        )
        return torch.load(output)


def _one_process(rank: int, count: int, port: int, output: Path, work: Callable, arguments: tuple) -> None:
    """What one of them does; the variables are those that `accelerate launch` sets."""
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    results = work(*arguments)
    if rank == 0:
        torch.save(results, output)
    if count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.save(in_processes(2, run_cases, Path(sys.argv[1]), 2), sys.argv[2])
