"""What one of several processes finds out for all."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from d3etr_hf.errors import UserError

Found = TypeVar("Found")


def on_main_process(find: Callable[[], Found]) -> Found:
    """Have the main process find something out, and every process go by it; all processes must call this.

    A process that looked for itself could see another state of the disk, and one that raised alone would leave the
    others waiting.

    Returns:
        What `find` returns, which must be picklable, on every process.

    Raises:
        UserError: what `find` raises, on every process.
    """
    found: list = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = find()
        except UserError as error:
            found[1] = error
    value, refusal = broadcast_object_list(found)
    if refusal is not None:
        refusal.of_all_processes = True
        raise refusal
    return value


def leave_processes() -> None:
    """Take this process out of its group, if it is in one, so that none of the group's threads outlives Python."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
