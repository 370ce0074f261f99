"""Minimum-cost bipartite matching of whole batches, through scipy: one copy to the host, threads, one copy back."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from d3etr_hf.errors import NonFiniteCostError

# cost entries from which threads are worth their start (96 matrices of 25 x 25)
THREADS_PAY_FROM = 50_000


class Problem(NamedTuple):
    """One kind of assignment for all layers and images.

    Attributes:
        cost: `(L, B, rows, columns)`, float.
        what: what is assigned to what, for the error.
        sizes: for each image the number of columns that count (the rest is padding); None: all of them.
    """

    cost: torch.Tensor
    what: str
    sizes: Sequence[int] | None = None


class Solution(NamedTuple):
    """The chosen entries of every matrix, rows ascending.

    Attributes:
        rows, columns: int64 `(L, B, P)` on the cost's device, P the most pairs that any image has; an image with
            fewer repeats row and column -1 at the end.
    """

    rows: torch.Tensor
    columns: torch.Tensor


def solve(problem: Problem) -> Solution:
    """One problem at once. Raises: NonFiniteCostError, as `start_solving`."""
    return start_solving({"": problem})()[""]


def start_solving(problems: Mapping[str, Problem], tolerant: bool = False) -> Callable[[], dict[str, Solution]]:
    """Begin to solve problems together, in threads where that pays (the solver releases Python's lock).

    Costs come to the host in one copy, and the function that is returned, which waits for the solutions, sends them
    to the device in one copy.

    Args:
        problems: by name; all costs on one device.
        tolerant: solve on where a cost is NaN or infinite, as if it were a very large one. The loss of such a step is
            not finite either, and a gradient scaler passes it over.

    Raises:
        NonFiniteCostError: a cost that counts is NaN or infinite, and `tolerant` is off (scipy would match NaN in
            silence).
    """
    costs = on_host([problem.cost for problem in problems.values()])
    matrices, widths = [], []
    for problem, cost in zip(problems.values(), costs, strict=True):
        found = _matrices(problem, cost, tolerant)
        matrices += found
        widths.append(max((min(matrix.shape) for matrix in found), default=0))
    pending = _solve_in_threads(matrices, sum(cost.size for cost in costs))
    device = next(iter(problems.values())).cost.device

    def wait() -> dict[str, Solution]:
        solved, arrays, start = pending(), [], 0
        for problem, width in zip(problems.values(), widths, strict=True):
            layers, images = problem.cost.shape[:2]
            pairs = np.full((layers * images, 2, width), -1, dtype=np.int64)
            for place, (rows, columns) in enumerate(solved[start : start + layers * images]):
                pairs[place, 0, : len(rows)], pairs[place, 1, : len(rows)] = rows, columns
            start += layers * images
            arrays.append(pairs.reshape(layers, images, 2, width))
        moved = on_device(arrays, device)
        return {name: Solution(*pairs.unbind(2)) for name, pairs in zip(problems, moved, strict=True)}

    return wait


def _matrices(problem: Problem, cost: np.ndarray, tolerant: bool) -> list[np.ndarray]:
    """Layer by layer and image by image what counts of the costs."""
    layers, images, _, columns = cost.shape
    sizes = problem.sizes or [columns] * images
    matrices = [cost[layer, image, :, : sizes[image]] for layer in range(layers) for image in range(images)]
    if np.isfinite(cost).all():
        return matrices
    for index, matrix in enumerate(matrices):  # rarely: then look where, among what counts
        if not np.isfinite(matrix).all():
            if not tolerant:
                raise NonFiniteCostError(problem.what, *divmod(index, images))
            matrices[index] = np.nan_to_num(matrix, nan=1e9, posinf=1e9, neginf=-1e9)
    return matrices


def on_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Floating-point tensors of one device as arrays, in a single copy; on a CPU without any."""
    tensors = [tensor.detach() for tensor in tensors]
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type == "cuda")
    parts = host.copy_(flat).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).numpy() for part, tensor in zip(parts, tensors, strict=True)]


def on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays of one type as tensors on a device, in a single copy; on a CPU without any."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    flat = flat.pin_memory() if device.type == "cuda" else flat
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _solve_in_threads(matrices: list[np.ndarray], entries: int) -> Callable[[], list]:
    """Start to solve all matrices; a function that waits for their row and column indices, in the same order."""
    if entries < THREADS_PAY_FROM:
        solved = _one_by_one(matrices)
        return lambda: solved
    threads = assignment_threads()
    parts: list[Future] = [_pool().submit(_one_by_one, matrices[part::threads]) for part in range(threads)]

    def wait() -> list:
        assignments = [None] * len(matrices)
        for part, solved in enumerate(parts):
            assignments[part::threads] = solved.result()
        return assignments

    return wait


def _one_by_one(matrices: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [linear_sum_assignment(matrix) for matrix in matrices]


def assignment_threads() -> int:
    """This process's share of the cores that it may run on; more than eight hardly help a batch."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(assignment_threads(), thread_name_prefix="assignment")


if sys.platform != "win32":
    # threads do not survive a fork (accelerate's notebook_launcher): the child starts its own
    os.register_at_fork(after_in_child=_pool.cache_clear)
