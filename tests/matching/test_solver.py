"""Costs in chunks and assignments in threads, of several problems at once, give what the plain computation gives."""

import os
import signal
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from d3etr_hf.errors import NonFiniteCostError
from d3etr_hf.matching import Problem, assignment_of, matching_cost, solve, solver, start_solving
from d3etr_hf.matching.matching_cost import prediction_cost
from d3etr_hf.outputs import NO_OBJECT, SigmoidScores, SoftmaxScores

LAYERS, IMAGES = 3, 5


def random_cost(rows: int, columns: int, layers: int = LAYERS, images: int = IMAGES, seed: int = 0) -> torch.Tensor:
    return torch.randn(layers, images, rows, columns, generator=torch.Generator().manual_seed(seed))


def assert_solved(solution, problem: Problem) -> None:
    """Layer by layer and image by image against scipy; what an image lacks is -1 at the end."""
    layers, images, _, columns = problem.cost.shape
    sizes = problem.sizes or [columns] * images
    for layer in range(layers):
        for image in range(images):
            expected = linear_sum_assignment(problem.cost[layer, image, :, : sizes[image]].numpy())
            rows, found = solution.rows[layer, image].numpy(), solution.columns[layer, image].numpy()
            count = len(expected[0])
            np.testing.assert_array_equal(rows[:count], expected[0])
            np.testing.assert_array_equal(found[:count], expected[1])
            assert (rows[count:] == -1).all() and (found[count:] == -1).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("sizes", [None, [1, 0, 30, 7, 2]])
def test_threads_assign_as_a_loop_does(monkeypatch, threads, sizes):
    """Every layer and image gets its own assignment back, also where the images do not divide among the threads."""
    monkeypatch.setattr(solver, "assignment_threads", lambda: threads)
    problem = Problem(random_cost(40, 30), "this to that", sizes)
    assert problem.cost.numel() < solver.THREADS_PAY_FROM
    monkeypatch.setattr(solver, "THREADS_PAY_FROM", 1)
    solution = solve(problem)
    assert solution.rows.shape == solution.columns.shape == (LAYERS, IMAGES, 30)
    assert_solved(solution, problem)


def several() -> dict[str, Problem]:
    """Of different layers, rows, columns and sizes: wide, tall, without any column, and with nothing to assign."""
    return {
        "pairs": Problem(random_cost(7, 9, seed=1), "teacher to student"),
        "student": Problem(random_cost(7, 4, seed=2), "ground truth to student queries", [4, 0, 2, 1, 3]),
        "last": Problem(random_cost(12, 4, layers=1, seed=3), "ground truth to teacher queries", [4, 0, 2, 1, 3]),
        "few": Problem(random_cost(2, 6, layers=2, seed=4), "ground truth to proposals queries", [6, 1, 0, 2, 3]),
        "none": Problem(random_cost(7, 0, seed=5), "ground truth to auxiliary queries", [0] * IMAGES),
        "empty": Problem(random_cost(7, 3, seed=6), "ground truth to other queries", [0] * IMAGES),
    }


@pytest.mark.parametrize("threads_pay_from", [1, 10**9])
def test_several_problems_at_once_equal_one_by_one(monkeypatch, threads_pay_from):
    monkeypatch.setattr(solver, "assignment_threads", lambda: 3)
    monkeypatch.setattr(solver, "THREADS_PAY_FROM", threads_pay_from)
    problems = several()
    together = start_solving(problems)()
    assert list(together) == list(problems)
    widths = {"pairs": 7, "student": 4, "last": 4, "few": 2, "none": 0, "empty": 0}
    for name, problem in problems.items():
        alone = solve(problem)
        for ours, theirs in zip(together[name], alone, strict=True):
            assert ours.dtype == torch.int64 and torch.equal(ours, theirs), name
        assert together[name].rows.shape == (*problem.cost.shape[:2], widths[name])
        assert_solved(together[name], problem)


def test_assignment_of_scatters_objects_to_queries():
    """Against a loop: images without an object, and with more objects than queries, among them."""
    for name, problem in several().items():
        layers, images, queries, columns = problem.cost.shape
        assignment = assignment_of(solve(problem), queries)
        sizes = problem.sizes or [columns] * images
        for layer in range(layers):
            for image in range(images):
                expected = torch.full((queries,), NO_OBJECT)
                rows, found = linear_sum_assignment(problem.cost[layer, image, :, : sizes[image]].numpy())
                expected[rows] = torch.from_numpy(found)
                assert torch.equal(assignment[layer, image], expected), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["pairs", "student", "last", "few"])
def test_errors_name_the_right_problem_layer_and_image(monkeypatch, name, value):
    monkeypatch.setattr(solver, "THREADS_PAY_FROM", 1)
    problems = several()
    layer = len(problems[name].cost) - 1
    problems[name].cost[layer, 3, 1, 0] = value
    with pytest.raises(NonFiniteCostError, match=f"{problems[name].what}.*layer {layer}, image 3") as caught:
        start_solving(problems)
    assert (caught.value.layer, caught.value.image) == (layer, 3)
    assert all(
        problem.what == problems[name].what or problem.what not in str(caught.value) for problem in several().values()
    )


def test_tolerant_solving_goes_on_and_leaves_the_other_matrices_as_they_are():
    """A NaN is a very large cost: it is chosen only where there is nothing else."""
    problems, clean = several(), {name: solve(problem) for name, problem in several().items()}
    problems["pairs"].cost[1, 2] = float("nan")
    problems["student"].cost[0, 3, :, 0] = torch.tensor([float("nan")] * 5 + [2.0, 1.0])
    problems["last"].cost[0, 0, 3] = -float("inf")
    solved = start_solving(problems, tolerant=True)()
    for name in problems:
        changed = {"pairs": (1, 2), "student": (0, 3), "last": (0, 0)}.get(name)
        for ours, before in zip(solved[name], clean[name], strict=True):
            same = (ours == before).all(-1)
            if changed is not None:
                same[changed] = True
            assert same.all(), name
    assert (
        solved["pairs"].rows[1, 2].tolist() == list(range(7)) and len(set(solved["pairs"].columns[1, 2].tolist())) == 7
    )
    assert solved["student"].rows[0, 3].tolist()[0] == 6  # image 3 has one object: the cheapest finite query
    assert 3 in solved["last"].rows[0, 0].tolist()
    assert problems["pairs"].cost[1, 2].isnan().all()  # costs that others hold are not written to


def test_bad_costs_are_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setattr(solver, "THREADS_PAY_FROM", 1)
    cost = random_cost(6, 4)
    cost[1, 2, 3, 0] = float("nan")
    with pytest.raises(NonFiniteCostError, match="this to that"):
        start_solving({"": Problem(cost, "this to that")})
    cost = random_cost(6, 4)
    cost[1, 2, 3, 3] = float("inf")  # in padding that no object stands behind
    solve(Problem(cost, "this to that", [4, 4, 3, 4, 4]))


@pytest.mark.parametrize("scores", [SigmoidScores(), SoftmaxScores()])
def test_costs_do_not_depend_on_the_chunks(monkeypatch, scores):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, LAYERS, IMAGES, 6, 4, generator=generator, dtype=torch.float64)
    boxes = torch.rand(2, LAYERS, IMAGES, 6, 4, generator=generator, dtype=torch.float64)

    def cost(pairs_at_once: int) -> torch.Tensor:
        monkeypatch.setattr(matching_cost, "PAIRS_AT_ONCE", pairs_at_once)
        probabilities = scores.probabilities(logits[0])
        return prediction_cost(probabilities, boxes[0], logits[1], boxes[1], scores, (1.0, 5.0, 2.0))

    whole = cost(10**6)
    assert whole.shape == (LAYERS, IMAGES, 6, 6) and whole.std() > 0.1
    for pairs in (1, 36, 4 * 36 + 1):
        torch.testing.assert_close(cost(pairs), whole, rtol=1e-12, atol=0)


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(solver.sys, "platform", "another")
    monkeypatch.setattr(solver.os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert solver.assignment_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert solver.assignment_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert solver.assignment_threads() == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_forked_process_assigns_too():
    """Threads do not survive a fork: without a pool of its own the child would wait for ever."""
    problem = Problem(random_cost(90, 90), "this to that")
    assert problem.cost.numel() >= solver.THREADS_PAY_FROM
    solve(problem)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        start_solving({"": problem})()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_costs_are_not_taken_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 1, 50, 91, generator=generator) - 3
    boxes = torch.rand(2, 1, 1, 50, 4, generator=generator)
    arguments = logits[0].sigmoid(), boxes[0], logits[1], boxes[1], SigmoidScores(), (1.0, 5.0, 2.0)
    plain = prediction_cost(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = prediction_cost(*arguments)
    assert torch.equal(plain, cast)
