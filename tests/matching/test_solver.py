"""Costs in chunks and assignments in threads give what the plain computation gives."""

import os
import signal
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from d3etr_hf.errors import NonFiniteCostError
from d3etr_hf.matching import solver as costs

LAYERS, IMAGES = 3, 5


def random_cost(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(LAYERS, IMAGES, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("sizes", [None, [1, 0, 30, 7, 2]])
def test_threads_assign_as_a_loop_does(monkeypatch, threads, sizes):
    """Every layer and image gets its own assignment back, also where the images do not divide among the threads."""
    monkeypatch.setattr(costs, "assignment_threads", lambda: threads)
    cost = random_cost(40, 30)
    assert cost.numel() < costs.THREADS_PAY_FROM
    monkeypatch.setattr(costs, "THREADS_PAY_FROM", 1)
    solved = costs.assign(cost, "this to that", sizes)
    assert len(solved) == LAYERS and {len(images) for images in solved} == {IMAGES}
    for layer in range(LAYERS):
        for image in range(IMAGES):
            size = 30 if sizes is None else sizes[image]
            expected = linear_sum_assignment(cost[layer, image, :, :size].numpy())
            np.testing.assert_array_equal(np.stack(solved[layer][image]), np.stack(expected))


def test_bad_costs_are_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setattr(costs, "THREADS_PAY_FROM", 1)
    cost = random_cost(6, 4)
    cost[1, 2, 3, 0] = float("nan")
    with pytest.raises(NonFiniteCostError, match="this to that"):
        costs.start_assigning(cost, "this to that")
    cost = random_cost(6, 4)
    cost[1, 2, 3, 3] = float("inf")  # in padding that no object stands behind
    costs.assign(cost, "this to that", [4, 4, 3, 4, 4])


def test_costs_do_not_depend_on_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, LAYERS, IMAGES, 6, 4, generator=generator, dtype=torch.float64)
    boxes = torch.rand(2, LAYERS, IMAGES, 6, 4, generator=generator, dtype=torch.float64)

    def cost(pairs_at_once: int) -> torch.Tensor:
        monkeypatch.setattr(costs, "PAIRS_AT_ONCE", pairs_at_once)
        return costs.prediction_cost(logits[0], boxes[0], logits[1], boxes[1], 1.0, 5.0, 2.0)

    whole = cost(10**6)
    assert whole.shape == (LAYERS, IMAGES, 6, 6) and whole.std() > 0.1
    for pairs in (1, 36, 4 * 36 + 1):
        torch.testing.assert_close(cost(pairs), whole, rtol=1e-12, atol=0)


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(costs.sys, "platform", "another")
    monkeypatch.setattr(costs.os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert costs.assignment_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert costs.assignment_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert costs.assignment_threads() == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_forked_process_assigns_too():
    """Threads do not survive a fork: without a pool of its own the child would wait for ever."""
    cost = random_cost(90, 90)
    assert cost.numel() >= costs.THREADS_PAY_FROM
    costs.assign(cost, "this to that")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        costs.assign(cost, "this to that")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_costs_are_not_taken_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 1, 50, 91, generator=generator) - 3
    boxes = torch.rand(2, 1, 1, 50, 4, generator=generator)
    plain = costs.prediction_cost(logits[0], boxes[0], logits[1], boxes[1], 1.0, 5.0, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = costs.prediction_cost(logits[0], boxes[0], logits[1], boxes[1], 1.0, 5.0, 2.0)
    assert torch.equal(plain, cast)
