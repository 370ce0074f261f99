"""What training options have built: optimizer, schedule, compiler and trackers, tried once before anything long."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType

from d3etr_hf.errors import UnsupportedOptionError, one_line
from d3etr_hf.training.option_checks import shown_options

# what the builders of optimizers, schedules and trackers raise
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# options that are shown with one that cannot be built
BUILT_WITH = {
    "optim": ("optim_args",),
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
    "torch_compile": ("torch_compile_backend", "torch_compile_mode"),
}


def check_what_options_build(args: Any) -> None:
    """What Transformers made of the options: optimizer, schedule and trackers are built once, of nothing.

    Raises:
        UnsupportedOptionError: one cannot be built, for a package or an argument that is missing; or float16 is asked
            for without a GPU.
    """
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise UnsupportedOptionError(
            "fp16=True needs a GPU, and this run would be on the CPU, in float32: leave it out, or use bf16"
        )
    if args.mixed_precision not in ("no", "fp16", "bf16"):
        raise UnsupportedOptionError(f"mixed precision {args.mixed_precision!r} is not supported: use bf16 or fp16")
    optimizer = _built(args, "optim", _build_optimizer)
    if args.learning_rate_drop is None:
        _built(args, "lr_scheduler_type", lambda args: _build_schedule(args, optimizer))
    if args.torch_compile:
        _built(args, "torch_compile", _compile)
    _built(args, "report_to", lambda args: [kind() for kind in get_reporting_integration_callbacks(args.report_to)])


def _built(args: Any, name: str, build: Callable[[Any], Any]) -> Any:
    """What `build` makes of the arguments; what the libraries raise when they cannot is told with the field's name."""
    try:
        return build(args)
    except BUILD_ERRORS as error:
        names = (name, *(further for further in BUILT_WITH.get(name, ()) if getattr(args, further) is not None))
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        wanting = "" if name == "report_to" else ", or set what it asks for"
        raise UnsupportedOptionError(
            f"{shown_options(args, names)}: cannot be built ({reason}); install what is missing{wanting}, or leave it "
            "out"
        ) from error


def _compile(args: Any) -> None:
    """Compiles next to nothing for the device: what is no backend or mode, or has no compiler, shows."""
    backend = DynamoBackend(args.torch_compile_backend.upper()).value.lower()
    torch.compile(torch.square, backend=backend, mode=args.torch_compile_mode)(torch.ones(2, device=args.device))


def _build_optimizer(args: Any) -> torch.optim.Optimizer:
    model: Any = torch.nn.ParameterList(
        [torch.ones(1, 1, device=args.device)]
    )  # a layer would draw from the random numbers of the run
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if own_groups := {"params", "model", "optimizer_dict"} & set(options):
        raise ValueError(f"it makes its own parameter groups ({', '.join(own_groups)})")
    optimizer = kind(model.parameters(), **options)
    if hasattr(optimizer, "train"):  # as Trainer does before each step
        optimizer.train()
    model[0].sum().backward()
    optimizer.step()
    return optimizer


def _build_schedule(args: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises what the schedule raises when it is built, or in its first steps."""
    steps = 10
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=0,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if isinstance(schedule, ReduceLROnPlateau) or args.lr_scheduler_type == SchedulerType.GREEDY:
        schedule.step(0.0)
        return
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    if not all(math.isfinite(rate) for rate in schedule.get_last_lr()):
        raise ValueError("a learning rate is not finite")
