"""Checks of Transformers' own training options: each is honoured, or refused in one line before anything long.

Transformers and its libraries look at many options late (in the first step, in the first evaluation) or not at all.
Everything that depends on the options alone is looked at here, when they are built.
"""

import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate.utils import GradientAccumulationPlugin
from huggingface_hub import get_token
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from d3etr_hf.errors import UnsupportedOptionError, one_line, quoted
from d3etr_hf.outputs import MOST_AUXILIARY_GROUPS

LARGEST, LARGEST_SEED = 2**31 - 1, 2**32 - 1

# least and largest value, both allowed
RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, LARGEST),
    "per_device_eval_batch_size": (1, LARGEST),
    "gradient_accumulation_steps": (1, LARGEST),
    "eval_accumulation_steps": (1, LARGEST),
    "torch_empty_cache_steps": (1, LARGEST),
    "save_total_limit": (1, LARGEST),
    "ema_warmup_steps": (0, LARGEST),
    "early_stopping_patience": (1, LARGEST),
    "denoising_groups": (0, 100),
    "denoising_box_noise": (0, 1),
    "denoising_label_noise": (0, 1),
    "one_to_many_queries": (0, 10_000),
    "one_to_many_repeats": (1, 1000),
    "matching_score_threshold": (0, 1),
    "shared_random_queries": (0, 10_000),
    "auxiliary_groups": (1, MOST_AUXILIARY_GROUPS),
    "warmup_steps": (0, LARGEST),
    "eval_delay": (0, LARGEST),
    "seed": (0, LARGEST_SEED),
    "data_seed": (0, LARGEST_SEED),
    "learning_rate": (0, 1e6),
    "backbone_learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6),
    "max_grad_norm": (0, 1e12),
    "adam_epsilon": (0, 1e6),
    "dataloader_num_workers": (0, 512),  # processes: more of them is a slip that stops the machine
    "dataloader_prefetch_factor": (1, LARGEST),
    "ddp_bucket_cap_mb": (1, LARGEST),
    "ddp_timeout": (1, LARGEST),
}

# what Transformers takes as text and looks up when it is built or later
CHOICES: dict[str, list[str]] = {
    "lr_scheduler_type": [choice.value for choice in SchedulerType],
    "optim": [choice.value for choice in OptimizerNames],
    "eval_strategy": [choice.value for choice in IntervalStrategy],
    "logging_strategy": [choice.value for choice in IntervalStrategy],
    "save_strategy": [choice.value for choice in SaveStrategy],
    "hub_strategy": [choice.value for choice in HubStrategy],
    "log_level": [*logging.get_log_levels_dict(), "passive"],
    "log_level_replica": [*logging.get_log_levels_dict(), "passive"],
    "train_sampling_strategy": ["random", "sequential"],  # the others read the length of a text
    "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods(),
}

ONE_PROCESS_A_GPU = (
    "several GPUs are used by `accelerate launch --multi_gpu`, one process a GPU, each with all weights"
)
OF_TEXT = "it is for models of text"

# what this trainer cannot honour, the values that ask for nothing, and why or what to do instead
REFUSED: dict[str, tuple[tuple, str]] = {
    "deepspeed": ((None,), ONE_PROCESS_A_GPU),
    "fsdp": ((None, "", False), ONE_PROCESS_A_GPU),
    "fsdp_config": ((None,), ONE_PROCESS_A_GPU),
    "parallelism_config": ((None,), ONE_PROCESS_A_GPU),
    "use_liger_kernel": ((False,), OF_TEXT),
    "liger_kernel_config": ((None,), OF_TEXT),
    "use_cache": ((False,), OF_TEXT),
    "neftune_noise_alpha": ((None,), OF_TEXT),
    "include_num_input_tokens_seen": (("no", False), OF_TEXT),
    "average_tokens_across_devices": ((True,), "losses are divided by the objects of all processes in any case"),
    "label_smoothing_factor": ((0,), "it has no meaning for a detection loss"),
    "label_names": ((None, ["labels"]), "a detector's are 'labels'"),
    "debug": (("", None, []), "what it hooks into a model cannot read masks, and is for tensor processing units"),
    "optim_target_modules": ((None,), "the optimizers that read it make parameter groups of their own"),
    "include_for_metrics": (([],), "average precision is computed of detections and the data set's own boxes"),
    "batch_eval_metrics": ((False,), "average precision is computed of a whole data set, not of batches"),
    "prediction_loss_only": ((False,), "evaluation computes average precision, and no loss"),
    "eval_do_concat_batches": ((True,), "apart, batches lose the shape of the detections"),
    "eval_use_gather_object": ((False,), "detections are tensors of one size"),
    "remove_unused_columns": ((False,), "it would drop the boxes"),
    "do_train": ((True,), "this is for training; a model alone is evaluated by `d3etr evaluate`"),
    "do_eval": (
        (True,),
        "a run ends with an evaluation, of which its results are; eval_strategy 'no' has none before",
    ),
    "do_predict": ((False,), "training predicts nothing; a model's detections are drawn by `d3etr visualize`"),
}

JSON_OPTIONS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def check_options(args: Any) -> None:
    """What can be said of options as they were given, before Transformers works on them.

    Raises:
        UnsupportedOptionError: a value of another type, out of range or unknown, an option that this trainer cannot
            honour, or one that another contradicts; the message names the field.
    """
    for name, (harmless, reason) in REFUSED.items():
        if getattr(args, name) not in harmless:
            _refuse(args, name, f"is not supported: {reason}; leave it out")
    _check_types(args)
    for name, (least, largest) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= largest:
            _refuse(args, name, f"must be from {least:g} to {largest:g}")
    for name, choices in CHOICES.items():
        if (value := getattr(args, name)) is not None and value not in choices:
            _refuse(args, name, f"choose one of {', '.join(choices)}")
    for names, is_wrong, message in CONDITIONS:
        if is_wrong(args):
            _refuse(args, names, message)
    _check_mappings(args)


def _refuse(args: Any, names: str | tuple[str, ...], message: str) -> None:
    raise UnsupportedOptionError(f"{shown_options(args, (names,) if isinstance(names, str) else names)}: {message}")


def shown_options(args: Any, names: tuple[str, ...]) -> str:
    """Fields and their values, none of which is longer than part of a line."""
    values = {name: getattr(args, name) for name in names}
    return ", ".join(f"{name}={quoted(getattr(value, 'value', value))}" for name, value in values.items())


# types


@functools.cache
def _validators(arguments_class: Any) -> dict[str, TypeAdapter]:
    """What tells whether a field's value is of its type; none for those that are looked at on their own."""
    aside = {*REFUSED, "accelerator_config"}
    return {
        name: TypeAdapter(hint, config=None if isinstance(hint, type) else ConfigDict(arbitrary_types_allowed=True))
        for name, hint in get_type_hints(arguments_class).items()
        if name in arguments_class.__dataclass_fields__ and name not in aside
    }


def _check_types(args: Any) -> None:
    kind_of_arguments: Any = type(args)
    for name, validator in _validators(kind_of_arguments).items():
        value = getattr(args, name)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        try:
            validator.validate_python(value, strict=True)
        except ValidationError as error:
            wanted = get_type_hints(type(args))[name]
            kind = wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
            message = "must be true or false" if wanted is bool else f"must be of type {kind}"
            raise UnsupportedOptionError(f"{name}={quoted(value)}: {message}") from error
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(args, name, "must be a finite number")
        if isinstance(value, int) and abs(value) > LARGEST_SEED:
            _refuse(args, name, f"must not be beyond {LARGEST}")


# conditions of one or several fields


def _steps_are_wrong(name: str, strategy: str) -> Callable[[Any], bool]:
    """Whether `name` is no share of the steps below 1, and no whole number from 1."""

    def is_wrong(args) -> bool:
        steps = getattr(args, name)
        if getattr(args, strategy) != "steps" or (name == "eval_steps" and steps is None):
            return False
        return not 0 < steps <= LARGEST or (steps > 1 and steps != int(steps))

    return is_wrong


def wants_best(args) -> bool:
    """Whether a metric decides about what is saved, how fast is learned or when it ends."""
    return (
        args.load_best_model_at_end
        or args.save_strategy == "best"
        or args.early_stopping_patience is not None
        or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    )


def _share_and_number(args) -> bool:
    """Whether of the steps of evaluation and saving one is a share and one a number, or they do not meet."""
    if not args.load_best_model_at_end or args.save_strategy != "steps" or args.eval_strategy != "steps":
        return False
    evaluated = args.logging_steps if args.eval_steps is None else args.eval_steps
    if (evaluated < 1) != (args.save_steps < 1):
        return True
    times = args.save_steps / evaluated
    return abs(times - round(times)) > 1e-6


STEPS = "must be a number of steps from 1, or a share of the training between 0 and 1"
CONDITIONS: tuple[tuple[str | tuple[str, ...], Callable[[Any], bool], str], ...] = (
    ("output_dir", lambda args: args.output_dir == "", "name a folder"),
    ("teacher_cache", lambda args: args.teacher_cache == "", "name a folder"),
    ("max_steps", lambda args: args.max_steps == 0 or args.max_steps < -1, "must be 1 or more, or -1 to go by epochs"),
    (
        ("num_train_epochs", "max_steps"),
        lambda args: args.max_steps < 0 and not 0 < args.num_train_epochs <= LARGEST,
        "not one step would be trained: set num_train_epochs above 0, or max_steps",
    ),
    ("logging_steps", _steps_are_wrong("logging_steps", "logging_strategy"), STEPS),
    ("eval_steps", _steps_are_wrong("eval_steps", "eval_strategy"), STEPS),
    ("save_steps", _steps_are_wrong("save_steps", "save_strategy"), STEPS),
    ("warmup_steps", lambda args: args.warmup_steps > 1 and args.warmup_steps != int(args.warmup_steps), STEPS),
    ("adam_beta1", lambda args: not 0 <= args.adam_beta1 < 1, "must be from 0 to below 1"),
    ("adam_beta2", lambda args: not 0 <= args.adam_beta2 < 1, "must be from 0 to below 1"),
    (("bf16", "fp16"), lambda args: args.bf16 and args.fp16, "choose one of the two"),
    (
        ("dataloader_persistent_workers", "dataloader_num_workers"),
        lambda args: args.dataloader_persistent_workers and args.dataloader_num_workers == 0,
        "there are no workers to keep: set dataloader_num_workers",
    ),
    (
        ("dataloader_prefetch_factor", "dataloader_num_workers"),
        lambda args: args.dataloader_prefetch_factor is not None and args.dataloader_num_workers == 0,
        "there are no workers to fetch ahead: set dataloader_num_workers",
    ),
    (
        ("dataloader_multiprocessing_context", "dataloader_num_workers"),
        lambda args: args.dataloader_multiprocessing_context is not None and args.dataloader_num_workers == 0,
        "there are no workers to start: set dataloader_num_workers",
    ),
    (
        "ddp_backend",
        lambda args: args.ddp_backend is not None and not torch.distributed.is_backend_available(args.ddp_backend),
        "PyTorch has no such backend here: leave it out",
    ),
    (
        ("load_best_model_at_end", "save_strategy", "eval_strategy"),
        lambda args: args.load_best_model_at_end and args.save_strategy not in ("best", args.eval_strategy),
        "the best can only be loaded of what is saved and evaluated at the same time: make the two strategies agree",
    ),
    (
        ("early_stopping_patience", "eval_strategy"),
        lambda args: args.early_stopping_patience is not None and args.eval_strategy == "no",
        "nothing is evaluated that could stop the training: set eval_strategy, for example to epoch",
    ),
    (
        ("load_best_model_at_end", "save_strategy", "lr_scheduler_type", "eval_strategy"),
        lambda args: wants_best(args) and args.eval_strategy == "no",
        "nothing is evaluated by which the best could be told: set eval_strategy",
    ),
    (
        ("save_steps", "eval_steps"),
        _share_and_number,
        "load_best_model_at_end needs save_steps a multiple of eval_steps",
    ),
    (
        "metric_for_best_model",
        lambda args: wants_best(args) and (args.metric_for_best_model or "").endswith("loss"),
        "evaluation computes average precision, and no loss: take AP",
    ),
    (
        ("lr_scheduler_type", "learning_rate_drop"),
        lambda args: (
            args.learning_rate_drop is not None and args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        ),
        "learning_rate_drop takes the schedule's place: leave one of the two out",
    ),
    (
        ("ddp_static_graph", "distillation_interval", "distillation_end"),
        lambda args: args.ddp_static_graph and (args.distillation_interval, args.distillation_end) != (1, 1),
        "steps with and without distillation are not alike: leave ddp_static_graph out",
    ),
    (
        ("bf16_full_eval", "fp16_full_eval"),
        lambda args: args.bf16_full_eval or args.fp16_full_eval,
        "they cast the student for good, and what is saved of it: leave them off (bf16 and fp16 evaluate in mixed "
        "precision)",
    ),
    (
        ("log_gradient_norms", "logging_strategy"),
        lambda args: args.log_gradient_norms and args.logging_strategy != "steps",
        "log_gradient_norms needs logging_strategy='steps'",
    ),
    (
        ("auxiliary_groups", "auxiliary_queries"),
        lambda args: args.auxiliary_groups > 1 and args.auxiliary_queries != "learned",
        "only learned queries make several groups: set auxiliary_queries='learned', or leave auxiliary_groups at 1",
    ),
    (
        ("logits_distillation_weight", "adaptive_matching"),
        lambda args: args.logits_distillation_weight > 0 and not args.adaptive_matching,
        "it follows the pairs of adaptive matching: set adaptive_matching to true",
    ),
    (
        "logits_layer_weights",
        lambda args: not all(0 <= weight <= LARGEST for weight in args.logits_layer_weights or ()),
        "must be numbers of 0 or more",
    ),
    (
        ("shared_query_weight", "shared_random_queries", "shared_teacher_queries", "shared_object_queries"),
        lambda args: args.shared_query_weight > 0 and not args.distillation.shared_groups,
        "there are no queries to share: set one of the last three",
    ),
    (
        ("shared_object_queries", "shared_query_weight"),
        lambda args: args.shared_object_queries and args.shared_query_weight == 0,
        "no loss is of them: set shared_query_weight above 0, or leave shared_object_queries out",
    ),
    (
        ("push_to_hub", "hub_token"),
        lambda args: args.push_to_hub and not (args.hub_token or get_token()),
        "there is no token to upload with: log in with `hf auth login`, or set HF_TOKEN",
    ),
)


# options that hold a mapping


def _check_mappings(args: Any) -> None:
    for name in JSON_OPTIONS:
        _read_mapping(args, name)
    known = signature(checkpoint).parameters.keys() - {"function", "args", "kwargs"}
    known |= {"preserve_rng_state", "every_n_layers", "offload"}  # the last two are Transformers' own
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        chosen = _read_mapping(args, name)
        if unknown := sorted(chosen.keys() - known):
            _refuse(args, name, f"activation checkpointing knows no {', '.join(unknown)}, only {sorted(known)}")
        if chosen.get("use_reentrant"):
            _refuse(args, name, "use_reentrant leaves attention maps without a gradient: set it to false")
    if not isinstance(args.accelerator_config, AcceleratorConfig | None):
        _check_accelerator_config(args)


def _read_mapping(args: Any, name: str) -> dict:
    value = getattr(args, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UnsupportedOptionError(f"{name}={quoted(value)}: is no JSON object ({error})") from error
    if not isinstance(value, dict | None):
        _refuse(args, name, "must hold argument names and their values")
    return value or {}


def _check_accelerator_config(args: Any) -> None:
    value = args.accelerator_config
    try:
        if isinstance(value, str):
            text = value if value.startswith("{") else Path(value).read_text(encoding="utf-8")
            value = json.loads(text)
        chosen = AcceleratorConfig(**value)
        for name, hint in get_type_hints(AcceleratorConfig).items():
            TypeAdapter(hint).validate_python(getattr(chosen, name), strict=True)
        GradientAccumulationPlugin(**(chosen.gradient_accumulation_kwargs or {}))
    except (OSError, TypeError, ValueError) as error:
        reason = one_line(error, 200)
        shown = quoted(args.accelerator_config)
        raise UnsupportedOptionError(f"accelerator_config={shown}: Accelerate does not take it ({reason})") from error
    if "num_steps" in (chosen.gradient_accumulation_kwargs or {}):
        _refuse(args, "accelerator_config", "num_steps is called gradient_accumulation_steps: set that option")
    if chosen.dispatch_batches:
        _refuse(args, "accelerator_config", "dispatch_batches cannot cut batches of images with their objects")
