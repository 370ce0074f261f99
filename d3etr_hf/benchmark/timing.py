"""Interleaved timing, the time of named parts inside a step, and peak memory."""

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tqdm.auto import tqdm


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that one call takes, device work included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, warmup: int = 2, title: str = "") -> dict:
    """Seconds of every call in every round `{name: array (rounds,)}`; the order is drawn anew each round.

    Everything that is compared is measured in one process, turn by turn, so that a busy machine hits all alike.
    """
    generator = np.random.default_rng(0)
    for call in calls.values():
        for _ in range(warmup):
            call()
    times = {name: np.empty(rounds) for name in calls}
    for index in tqdm(range(rounds), desc=title, leave=False):
        for name in generator.permutation(list(calls)):
            times[name][index] = seconds_of(calls[name])
    return times


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
