"""Counts where a training step would wait for a device, without one.

On a device each of these waits for all the work that was given to it. A dispatch hook sees `.item()` and what reads
the number of true entries on the host; `.tolist()`, `.cpu()`, `.to("cpu")` and Python's own conversions are patched.
The solver's single copy of all costs counts as one, whatever it is made of on a CPU.
"""

from collections import Counter
from collections.abc import Iterator
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


@contextmanager
def counted_synchronisations(single_copies: list[tuple[object, str]]) -> Iterator[Counter]:
    """Count what would wait for a device while the block runs, by its name.

    Args:
        single_copies: (module, function) pairs that copy to the host once, however they do it.
    """
    counts: Counter = Counter()
    inside = [False]

    def counting(name, function, applies=lambda *args, **kwargs: True):
        def wrapper(*args, **kwargs):
            if not inside[0] and applies(*args, **kwargs):
                counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    def once(name, function):
        def wrapper(*args, **kwargs):
            counts[name] += 1
            inside[0] = True
            try:
                return function(*args, **kwargs)
            finally:
                inside[0] = False

        return wrapper

    def to_host(tensor, *args, **kwargs):
        # by name: where everything lies on a CPU a device that is passed says nothing
        return "cpu" in (kwargs.get("device"), *args[:1])

    with ExitStack() as stack:
        for name in ("tolist", "cpu"):
            stack.enter_context(patch.object(torch.Tensor, name, counting(name, getattr(torch.Tensor, name))))
        stack.enter_context(patch.object(torch.Tensor, "to", counting("to cpu", torch.Tensor.to, to_host)))
        for owner, name in single_copies:
            stack.enter_context(patch.object(owner, name, once(name, getattr(owner, name))))
        stack.enter_context(_Hook(counts))
        yield counts
