"""Counts where a training step would wait for a device, and what it would copy there, without one.

On a device each wait is for all the work that was given to it. A dispatch hook sees `.item()` and what reads the
number of true entries on the host; `.tolist()`, `.cpu()`, `.to("cpu")` and Python's own conversions are patched. The
solver's single copy of all costs counts as one, whatever it is made of on a CPU.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READ_ON_THE_HOST = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
}


class _Hook(TorchDispatchMode):
    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READ_ON_THE_HOST or masks:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Counting:
    """Patches functions so that their calls are counted, those within a single copy left out."""

    def __init__(self):
        self.counts: Counter = Counter()
        self._inside = False
        self._stack = ExitStack()

    def each(self, owner, name: str, title: str, applies: Callable[..., bool] = lambda *args, **kwargs: True) -> None:
        """Count the calls of `owner.name` that apply."""
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            if not self._inside and applies(*args, **kwargs):
                self.counts[title] += 1
            return function(*args, **kwargs)

        self._stack.enter_context(patch.object(owner, name, wrapper))

    def once(self, owner, name: str) -> None:
        """Count a call of `owner.name` as one, whatever it calls."""
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            self.counts[name] += 1
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        self._stack.enter_context(patch.object(owner, name, wrapper))

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()


def _to_host(tensor, *args, **kwargs) -> bool:
    """Whether `Tensor.to` names the CPU. Where everything lies on one, a device that is passed on says nothing: only
    what the calling line writes out counts."""
    given = (kwargs.get("device"), *args[:1])
    if any(isinstance(device, str) and device == "cpu" for device in given):
        return True
    if not any(isinstance(device, torch.device) and device.type == "cpu" for device in given):
        return False
    caller = sys._getframe(2)
    return 'device("cpu")' in linecache.getline(caller.f_code.co_filename, caller.f_lineno).replace("'", '"')


@contextmanager
def counted_synchronisations(single_copies: list[tuple[object, str]]) -> Iterator[Counter]:
    """Count what would wait for a device while the block runs, by its name.

    Args:
        single_copies: (module, function) pairs that copy to the host once, however they do it.
    """
    with _Counting() as counting:
        for name in ("tolist", "cpu"):
            counting.each(torch.Tensor, name, name)
        counting.each(torch.Tensor, "to", "to cpu", _to_host)
        for owner, name in single_copies:
            counting.once(owner, name)
        with _Hook(counting.counts):
            yield counting.counts


@contextmanager
def counted_copies_to_device(single_copies: list[tuple[object, str]]) -> Iterator[Counter]:
    """Count what would be copied from the host to a device while the block runs, by its name.

    Such a copy waits for no result, but it is a transfer of its own, from memory that is not pinned. The move of a
    batch is not seen: on a CPU it moves nothing.

    Args:
        single_copies: (module, function) pairs that copy to the device once, however they do it.
    """

    def to_a_device(*args, device=None, **kwargs) -> bool:
        return device is not None

    with _Counting() as counting:
        for name in ("tensor", "as_tensor", "asarray"):
            counting.each(torch, name, name, to_a_device)
        counting.each(torch.Tensor, "new_tensor", "new_tensor")
        for owner, name in single_copies:
            counting.once(owner, name)
        yield counting.counts
