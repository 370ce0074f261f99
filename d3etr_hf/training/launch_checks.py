"""Checks of how a training was launched: honoured, or refused by what the launcher set."""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from d3etr_hf.errors import UnsupportedOptionError, quoted
from d3etr_hf.training.option_checks import ONE_PROCESS_A_GPU

# what `accelerate launch` asks of the processes that it starts
ASKED_FOR = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
PRECISIONS = ("no", "bf16", "fp16")
UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def check_launcher() -> None:
    """Refuse what a launcher asked for by variables; before anything is built, for much of it would be ignored.

    Raises:
        UnsupportedOptionError: weights or batches in parts, or a precision that is not known here.
    """
    for variable, kind in ASKED_FOR.items():
        value = os.environ.get(variable, "")
        if value.lower() not in ("", "0", "f", "false", "n", "no", "off"):
            raise UnsupportedOptionError(
                f"the launcher asks for {kind} ({variable}={quoted(value)}), which is not supported: "
                f"{ONE_PROCESS_A_GPU}"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:
        raise UnsupportedOptionError(
            f"the launcher asks for mixed precision {quoted(precision)} (ACCELERATE_MIXED_PRECISION), which is not "
            f"supported: choose one of {', '.join(PRECISIONS)}"
        )


def check_launch(accelerator: Accelerator, args: Any) -> None:
    """Refuse ways of launching that this trainer does not know.

    Raises:
        UnsupportedOptionError: several GPUs in one process, FSDP, DeepSpeed, TPUs, whoever asked for them; batches
            whose size each of several processes would find for itself.
    """
    if args.auto_find_batch_size and accelerator.num_processes > 1:
        raise UnsupportedOptionError(
            f"auto_find_batch_size=True on {accelerator.num_processes} processes: one alone may run out of memory and "
            "take smaller batches than the others; find the size on one process, and set per_device_train_batch_size"
        )
    if args.n_gpu > 1 or accelerator.distributed_type in UNSUPPORTED:
        raise UnsupportedOptionError(
            "several GPUs in one process, FSDP, DeepSpeed and TPUs are not supported (here: "
            f"{accelerator.distributed_type}, {args.n_gpu} GPUs in this process): start one process a GPU with "
            "`accelerate launch --multi_gpu`"
        )
