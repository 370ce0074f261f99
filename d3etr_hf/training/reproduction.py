"""A step that a training kept, taken again on one process: every loss term, and where the first NaN comes from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from d3etr_hf.errors import DamagedFileError, NonFiniteLossError, one_line, quoted
from d3etr_hf.models.configuration_checks import check_fields
from d3etr_hf.models.detector import ADAPTERS, Detector
from d3etr_hf.models.families import FAMILIES
from d3etr_hf.models.loading import load_teacher
from d3etr_hf.models.trial import build_errors
from d3etr_hf.training.kept_step import Batch, KeptStep, read_step
from d3etr_hf.training.trainer import DistillationTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


@dataclass
class Reproduction:
    """What came of it.

    Attributes:
        kept: what the file says.
        weights: names of the student's tensors that hold NaN or infinity before the step.
        modules: names of its modules whose output does though their inputs do not, in the order in which they ran.
        terms: by "group/term", the weighted value in each decoder layer.
        gradients: names of parameters whose gradient does.
        refused: why there are no terms, where the predictions cannot be matched.
    """

    kept: KeptStep
    weights: list[str]
    modules: list[str] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    gradients: list[str] = field(default_factory=list)
    refused: str = ""


def reproduce_step(path: str | Path, use_cpu: bool = False) -> Reproduction:
    """Take a kept step again.

    Bit by bit on one process and the same kind of device; the step of several is this process's part of it.

    Args:
        path: of the file.
        use_cpu: leave the accelerator alone.

    Raises:
        DamagedFileError: the file cannot be read.
        DetectorLoadError: its teacher cannot be loaded.
    """
    kept, state, batch = read_step(path)
    found = Reproduction(kept, _not_finite(state))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer_of(kept, path, folder, use_cpu)
        if not trainer.model.query_adapters:  # a step without distillation uses none
            state = {name: value for name, value in state.items() if not name.startswith(f"{ADAPTERS}.")}
        try:
            trainer.model.load_state_dict(state)
        except RuntimeError as error:
            raise DamagedFileError(f"{path} is damaged ({one_line(error)}): let the training keep another") from error
        _take(trainer, batch, found)
    return found


def _trainer_of(kept: KeptStep, path: str | Path, folder: str, use_cpu: bool) -> DistillationTrainer:
    student = _student_of(kept.config, str(path))
    try:
        arguments = D3etrTrainingArguments(
            output_dir=folder,
            report_to="none",
            bf16=kept.mixed_precision == "bf16",
            use_cpu=use_cpu,
            **kept.options,
        )
    except (TypeError, ValueError) as error:
        raise DamagedFileError(
            f"{path} holds options that are none of this version ({one_line(error)}): let the training keep another"
        ) from error
    teacher = None if kept.teacher is None else load_teacher(kept.teacher)
    trainer = DistillationTrainer(student, arguments, teacher)
    trainer.state.global_step = kept.step - 1  # of which queries may be drawn
    return trainer


def _student_of(fields: dict, what: str) -> Detector:
    check_fields(fields, what)
    if fields["model_type"] not in FAMILIES:
        raise DamagedFileError(f"{what} holds a step of a {quoted(fields['model_type'])} model, which is no student")
    with build_errors(what):
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        return FAMILIES[config.model_type](config)


def _take(trainer: DistillationTrainer, batch: Batch, found: Reproduction) -> None:
    # with autocast, where the training had it
    model = trainer.accelerator.prepare_model(trainer.model.train(), evaluation_mode=True)
    device = trainer.args.device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.inputs.items()}
    batch.restore_random(device)
    with _watching(model, found.modules):
        try:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=batch.counts.to(device))
        except NonFiniteLossError as error:
            found.refused = str(error.__cause__ or error)
            return
        found.terms = trainer.guard.values()
        loss.backward()
    found.gradients = _not_finite({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@contextmanager
def _watching(model: Detector, names: list[str]) -> Iterator[None]:
    """Adds the modules that make something that is not finite of what is."""

    def watch(name: str):
        def hook(module, arguments, keywords, output):
            if _finite((arguments, keywords)) and not _finite(output):
                names.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(values) -> bool:
    """Whether all tensors in these lists and mappings are."""
    if torch.is_tensor(values):
        return not values.is_floating_point() or bool(values.isfinite().all())
    if isinstance(values, dict):
        return all(map(_finite, values.values()))
    return not isinstance(values, list | tuple) or all(map(_finite, values))


def _not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not _finite(value)]
