"""Matching costs in batched tensor operations; the assignments they lead to, through scipy."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from d3etr_hf.errors import NonFiniteCostError
from d3etr_hf.matching.boxes import generalised_iou

# per layer and image, row and column indices
Assignments = list[list[tuple[np.ndarray, np.ndarray]]]

# pairs of predictions whose costs are computed at once: temporaries then stay in a processor's cache, where one call
# for everything would spend most of its time on fresh memory
PAIRS_AT_ONCE = 2**20
# cost entries from which threads are worth their start (96 matrices of 25 x 25)
THREADS_PAY_FROM = 50_000


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def prediction_cost(
    teacher_logits: torch.Tensor,
    teacher_boxes: torch.Tensor,
    student_logits: torch.Tensor,
    student_boxes: torch.Tensor,
    class_weight: float,
    l1_weight: float,
    giou_weight: float,
) -> torch.Tensor:
    """Cost between all teacher and all student predictions, without gradient (README, the method).

    `class_weight * sum_c BCE(teacher score, student score) + l1_weight * L1 - giou_weight * GIoU`, with the teacher's
    scores as soft targets.

    Args:
        teacher_logits, student_logits: `(L, B, N_t, C)` and `(L, B, N_s, C)` before the sigmoid.
        teacher_boxes, student_boxes: `(L, B, N_t, 4)` and `(L, B, N_s, 4)`, cxcywh in 0..1.

    Returns:
        `(L, B, N_t, N_s)`, float32 or wider.
    """
    device = student_logits.device.type
    images = [wide(tensor).flatten(0, 1) for tensor in (teacher_logits, teacher_boxes, student_logits, student_boxes)]
    pairs = teacher_logits.shape[2] * student_logits.shape[2]
    chunks = zip(*(tensor.split(max(1, PAIRS_AT_ONCE // pairs)) for tensor in images), strict=True)
    with torch.autocast(device, enabled=False):
        cost = torch.cat([_cost_of_images(*chunk, class_weight, l1_weight, giou_weight) for chunk in chunks])
    return cost.unflatten(0, teacher_logits.shape[:2])


def _cost_of_images(
    teacher_logits, teacher_boxes, student_logits, student_boxes, class_weight, l1_weight, giou_weight
) -> torch.Tensor:
    # sum_c BCE(p, x) = sum_c softplus(x) - p x: one matrix product for all pairs
    cost = nn.functional.softplus(student_logits).sum(-1)[:, None] - teacher_logits.sigmoid() @ student_logits.mT
    cost.mul_(class_weight).add_(torch.cdist(teacher_boxes, student_boxes, p=1), alpha=l1_weight)
    return cost.sub_(generalised_iou(teacher_boxes[:, :, None], student_boxes[:, None]), alpha=giou_weight)


def assign(cost: torch.Tensor, what: str, sizes: list[int] | None = None) -> Assignments:
    """Minimum-cost assignment of the rows and columns of every matrix.

    Args:
        cost: `(L, B, rows, columns)`.
        what: what is assigned to what, for the error.
        sizes: for each image the number of columns that count (the rest is padding); all of them by default.

    Returns:
        Per layer and image, int64 row and column indices of the min(rows, columns) chosen entries, rows ascending.

    Raises:
        NonFiniteCostError: a cost that counts is NaN or infinite (scipy would match NaN in silence).
    """
    return start_assigning(cost, what, sizes)()


def start_assigning(cost: torch.Tensor, what: str, sizes: list[int] | None = None) -> Callable[[], Assignments]:
    """As `assign`, in threads of their own where that pays (the solver releases Python's lock).

    Returns:
        A function that waits for the assignments and returns them; the error is raised before. Until it has returned
        `cost` must not be written to.
    """
    host = cost.detach().cpu().numpy()
    layers, images = host.shape[:2]
    sizes = sizes or [host.shape[-1]] * images
    matrices = [host[layer, image, :, : sizes[image]] for layer in range(layers) for image in range(images)]
    if not np.isfinite(host).all():  # rarely: then look where, among what counts
        for index, matrix in enumerate(matrices):
            if not np.isfinite(matrix).all():
                raise NonFiniteCostError(what, *divmod(index, images))

    def by_layer(assignments: list) -> Assignments:
        return [assignments[start : start + images] for start in range(0, len(assignments), images)]

    if host.size < THREADS_PAY_FROM:
        return partial(by_layer, _one_by_one(matrices))
    threads = assignment_threads()
    parts = [_pool().submit(_one_by_one, matrices[part::threads]) for part in range(threads)]

    def wait() -> Assignments:
        assignments = [None] * len(matrices)
        for part, solved in enumerate(parts):
            assignments[part::threads] = solved.result()
        return by_layer(assignments)

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
