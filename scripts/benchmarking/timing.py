"""The time of named parts inside a step, and peak memory."""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from d3etr_hf.evaluation.timing import synchronise


@contextmanager
def timed_parts(parts: dict[str, Sequence[tuple[object, str]]]) -> Iterator[dict[str, float]]:
    """Add up the seconds spent in functions while the block runs.

    Args:
        parts: for each name, the (module or object, attribute) pairs that make it up. The innermost counts: time in a
            part that another part calls is taken off the caller's.

    Yields:
        `{name: seconds}`, filled as the block runs.
    """
    totals, inside = defaultdict(float), [0.0]

    def timed(name, function):
        def wrapper(*args, **kwargs):
            inside.append(0.0)
            synchronise()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronise()
                elapsed = time.perf_counter() - start
                totals[name] += elapsed - inside.pop()
                inside[-1] += elapsed

        return wrapper

    with ExitStack() as stack:
        for name, functions in parts.items():
            for owner, attribute in functions:
                stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield totals


def peak_memory() -> float:
    """MiB at the peak of this process: of the allocator on an accelerator, else of the resident set."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**20
    if sys.platform == "linux":  # getrusage's peak is handed down to a child process
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
