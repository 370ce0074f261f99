"""How long a call takes, and several calls turn by turn."""

import time
from collections.abc import Callable

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
