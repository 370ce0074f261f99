"""Time and memory of a training's optimizer in advance, from two steps of a twin on copies of the parameters."""

import copy
from dataclasses import dataclass

import torch

from d3etr_hf.errors import BatchSizeError, one_line
from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.training.memory import GIB, memory_to_be_had, ran_out_of_memory
from d3etr_hf.training.option_trials import BUILD_ERRORS
from d3etr_hf.training.trainer import DistillationTrainer


@dataclass(frozen=True)
class OptimizerTrial:
    """What an optimizer takes.

    Attributes:
        seconds: of clipping and a step; 0 where no twin could be tried.
        kept: what it keeps between steps, by parameter; here to take its memory.
        failure: why no twin could be tried, in one line; None if one was.
    """

    seconds: float
    kept: list[dict]
    failure: str | None = None


def try_optimizer(trainer: DistillationTrainer) -> OptimizerTrial:
    """Clip and step copies of the parameters, as the training's optimizer would.

    Raises:
        BatchSizeError: they do not fit in memory.
    """
    prepared = trainer.optimizer.optimizer  # type: ignore[attr-defined]  # of Accelerate's wrapper
    try:
        twin = twin_of(prepared, trainer.optimizer_options)
        return _try_twin(twin, trainer.args.max_grad_norm)
    except BUILD_ERRORS as error:
        if not ran_out_of_memory(error):
            return OptimizerTrial(0.0, [], one_line(f"{type(error).__name__}: {error}", 300))
        to_be_had = memory_to_be_had(trainer.args.device)
        raise BatchSizeError(
            f"{type(prepared).__name__}: a copy of the parameters that it trains, their gradients and what it keeps "
            f"of them do not fit in {to_be_had / GIB:.1f} GiB of memory, without any image; train a smaller model, "
            "set optim to one that keeps less, or free memory (probe=False tries it all the same)"
        ) from error


def twin_of(optimizer: torch.optim.Optimizer, options: dict | None) -> torch.optim.Optimizer:
    """Another optimizer of the same kind, ready to step copies of the parameters.

    Args:
        options: that it was built with beside its groups; None where only its maker knows them. It is copied then,
            and a copy of an optimizer has nothing but its groups, defaults and state.
    """
    if options is None:
        twin = copy.deepcopy(optimizer)
    else:
        twin = type(optimizer)(copy.deepcopy(optimizer.param_groups), **options)
    if hasattr(twin, "train"):  # as Trainer does before each step
        twin.train()
    return twin


def _try_twin(twin: torch.optim.Optimizer, max_norm: float) -> OptimizerTrial:
    parameters = [parameter for group in twin.param_groups for parameter in group["params"]]

    def step() -> None:
        if max_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        twin.step()

    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    step()
    seconds = seconds_of(step)
    return OptimizerTrial(seconds, list(twin.state.values()))
