"""The steps that are compared, each through the trainer that a user would call."""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from transformers import Trainer

from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.losses import DetectionCriterion, detection_loss
from d3etr_hf.matching import mix_matcher, solver
from d3etr_hf.models import group_attention
from d3etr_hf.outputs import GroupRequest
from d3etr_hf.training import objective
from d3etr_hf.training.teacher import Teacher, teacher_pixels
from d3etr_hf.training.trainer import DistillationTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

from .attention_forms import FORMS, with_forms
from .sizes import Size, make_batch, make_detector, stock_labels, stock_twin
from .timing import timed_parts

STEPS = ("plain", "teacher", "two groups", "step")


def make_steps(size: Size, precision: str = "no", names: tuple[str, ...] = STEPS) -> dict[str, Callable[[], None]]:
    """One call for each of `names`: a step on the same batch.

    - plain: a training step of the stock model with `auxiliary_loss` and its own loss, by Transformers' Trainer.
    - teacher: the teacher's forward pass, no gradient, fused attention, no maps.
    - two groups: a training step of the student with a learned second group and detection losses alone, no maps and
      no teacher.
    - step: a D3ETR training step with everything on.
    - step_plain_forms, step_custom_forms: the same with either form of attention maps, see `attention_forms`.
    """
    makers = {"plain": _plain, "teacher": _teacher, "two groups": _two_groups, "step": _step}
    for name, forms in FORMS.items():
        makers[name] = lambda size, precision, forms=forms: with_forms(_step(size, precision), forms)
    return {name: makers[name](size, precision) for name in names}


def distillation_trainer(size: Size, precision: str = "no", train_dataset=None, **options) -> DistillationTrainer:
    """A trainer of the size's student under its teacher, with these training arguments."""
    names = None if train_dataset is None else train_dataset.class_names
    return DistillationTrainer(
        model=make_detector(size.student, size, 1, names),
        args=_arguments(precision, **options),
        teacher=make_detector(size.teacher, size, 0, names),
        train_dataset=train_dataset,
    )


def training_step(trainer: Trainer, batch: dict) -> None:
    """What Trainer's own loop does for one optimizer step."""
    count = None
    if isinstance(trainer, DistillationTrainer):
        count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.training_step(trainer.model_wrapped, batch, count)
    trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model_wrapped.zero_grad()


def step_parts(size: Size, precision: str = "no", rounds: int = 10) -> list[dict[str, float]]:
    """Seconds of every part of a D3ETR step, one dictionary a round.

    "attention with maps" is that of student and teacher; "rest" is what no other part covers: the student's forward
    pass without its decoder's attention, moving the batch, logging.
    """
    trainer = ready(distillation_trainer(size, precision))
    batch = trainer._prepare_inputs(make_batch(size))
    losses = ("self_attention_distillation", "cross_attention_distillation", "prediction_distillation", "pair_weights")
    parts = {
        "teacher": [(Teacher, "__call__")],
        "attention with maps": [(group_attention, "attend")],
        "costs": [(mix_matcher, "prediction_cost"), (detection_loss, "assignment_problem")],
        "assignment": [(objective, "start_solving"), (Future, "result"), (solver, "on_device")],
        "matching, rest": [
            (objective.D3etrObjective, "_problems"),
            (mix_matcher, "MatchedPairs"),
            (objective, "fixed_pairs"),
            (objective, "assignment_of"),
            (objective, "matched_foreground_share"),
        ],
        "distillation losses": [(objective, name) for name in losses],
        "detection losses": [(DetectionCriterion, "losses")],
        "backward": [(trainer.accelerator, "backward")],
        "optimizer": [(trainer.accelerator, "clip_grad_norm_"), (trainer.optimizer, "step")],
    }
    found = []
    for index in range(rounds + 2):
        with timed_parts(parts) as seconds:
            whole = seconds_of(lambda: training_step(trainer, batch))
        if index >= 2:  # the first ones allocate
            found.append(seconds | {"rest": whole - sum(seconds.values()), "step": whole})
    return found


def _arguments(precision: str, **options) -> D3etrTrainingArguments:
    return D3etrTrainingArguments(
        output_dir=str(Path(tempfile.gettempdir()) / "d3etr_hf_benchmark"),  # stays empty
        report_to="none",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        **options,
    )


def ready(trainer: Trainer) -> Trainer:
    """The trainer as it is inside its training loop."""
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _plain(size: Size, precision: str) -> Callable[[], None]:
    model = stock_twin(make_detector(size.student, size, seed=1))
    trainer = ready(Trainer(model=model, args=_arguments(precision)))
    batch = make_batch(size)
    pixels = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    batch = trainer._prepare_inputs(pixels | {"labels": stock_labels(batch)})
    return lambda: training_step(trainer, batch)


def _teacher(size: Size, precision: str) -> Callable[[], None]:
    trainer = distillation_trainer(size, precision)
    pixels = teacher_pixels(trainer._prepare_inputs(make_batch(size)))

    def forward() -> None:
        with torch.no_grad(), trainer.accelerator.autocast():
            trainer.teacher.detector(**pixels, request=GroupRequest())

    return forward


def _two_groups(size: Size, precision: str) -> Callable[[], None]:
    # learned queries, as many as the student's: a teacher whose queries depend on the image would have to run for them
    return _step(size, precision, adaptive_matching=False, fixed_matching=False, auxiliary_queries="learned")


def _step(size: Size, precision: str, **options) -> Callable[[], None]:
    trainer = ready(distillation_trainer(size, precision, **options))
    batch = trainer._prepare_inputs(make_batch(size))
    return lambda: training_step(trainer, batch)
