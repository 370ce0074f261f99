"""Two processes against one: evaluation, the first step's gradients and the log (HF_NOTES 9, 13 and 16)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from tests.distributed_worker import AS_TRAINED, CASES, NOTHING_DRAWN, run_cases
from tests.shapes_fixture import SIDE, keep_objects
from tests.tiny import tiny_model

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Every case in this process, and in two that share its images: one launch for all."""
    folder = tmp_path_factory.mktemp("distributed")
    make_shapes(folder / "shapes", 12, 11, image_size=SIDE, progress=False)
    make_shapes(folder / "sparse", 4, 1, image_size=SIDE, progress=False)
    keep_objects(folder / "sparse", "train", [0, 0, 1, 0])
    for family in {case.family for case in CASES.values()}:
        tiny_model(2, family, **NOTHING_DRAWN.get(family, {})).save_pretrained(folder / family)
    for case in AS_TRAINED.values():
        tiny_model(2, case.family).save_pretrained(folder / f"{case.family} as trained")
    command = [sys.executable, str(WORKER), str(folder), str(folder / "two.pt")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    return run_cases(folder, 1), torch.load(folder / "two.pt")


def test_evaluation_is_the_same_on_two_processes(both):
    """11 images in batches of 3: the last batch is ragged over the processes."""
    one, two = (results["pairs"]["metrics"] for results in both)
    names = [name for name in one if name.startswith(("eval_AP", "eval_AR"))]
    assert len(names) > 8 and one["eval_AR_100"] > 0
    for name in names:
        assert two[name] == pytest.approx(one[name], abs=1e-9), name


# The cases without objects fail wherever the number of boxes is clamped to one after it was averaged over processes.
@pytest.mark.parametrize("case", CASES)
def test_first_gradients_are_the_same_on_two_processes(both, case):
    """The stock detection loss would be twice too large: it divides the boxes by the world size twice."""
    one, two = (results[case]["gradients"] for results in both)
    assert one.keys() == two.keys() and len(one) > 100
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_logged_terms_are_the_same_on_two_processes(both, case):
    one, two = (results[case]["log"] for results in both)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.startswith("loss"):
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_steps_without_distillation_are_the_same_on_two_processes(both):
    """Processes must not wait for gradients of parameters that such a step leaves out."""
    one, two = (results["planned"] for results in both)
    assert [entry.keys() for entry in one] == [entry.keys() for entry in two] and len(one) == 4
    assert ["loss/student/prediction" in entry for entry in one] == [True, False, True, False]
    for entry, other in zip(one, two, strict=True):
        for name, value in entry.items():
            if name.startswith("loss"):
                assert other[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_the_cases_are_what_they_are_called(both):
    """Each trains what only it has."""
    one, _ = both
    assert one["no object"]["log"]["loss/student/l1"] == 0 < one["one object"]["log"]["loss/student/l1"]
    plain = one["pairs"]["gradients"].keys()
    assert len(one["learned queries"]["gradients"].keys() - plain) == 3
    assert one["confident pairs"]["log"]["loss/student/logits"] > 0
    shared = {name for name in one["shared queries"]["log"] if name.endswith("/shared_query")}
    assert shared == {f"loss/{kind}_queries/shared_query" for kind in ("random", "teacher", "object")}
    assert len(one["projected queries"]["gradients"].keys() - plain) == 2


@pytest.mark.parametrize("case", AS_TRAINED)
def test_running_statistics_are_the_same_in_every_process_when_evaluated(both, case):
    """Each process counts its own images in a step; what is evaluated and saved is one model."""
    one, two = (results[case] for results in both)
    assert two["spread"] == 0 and one["gradients"].keys() == two["gradients"].keys()
    assert {name for name in one["metrics"]} == {name for name in two["metrics"]}
    terms = [{name for name in log if name.startswith("loss")} for log in (one["log"], two["log"])]
    assert terms[0] == terms[1] and any("denoising" in name for name in terms[0])


def test_all_processes_stop_after_the_same_step(both):
    """One of them is asked; alone it stops at once, and what it tells the other comes with the next step."""
    one, two = (results["stop"] for results in both)
    assert one == [1, "checkpoint-1"] and two == [2, 2, "checkpoint-2"]


def test_a_probe_changes_nothing_on_two_processes_and_one_of_them_prints(both):
    for processes, found in enumerate(both, 1):
        (lines, *probed), (no_lines, *without) = (list(zip(*of_run, strict=True)) for of_run in found["probe"])
        assert lines == (3, 0)[:processes] and no_lines == (0, 0)[:processes]
        assert probed == without and len(probed) > 100


def test_a_run_of_two_processes_that_is_killed_goes_on_as_if_nothing_had_been(both):
    """Augmentation and dropout, each process with random numbers of its own; within an epoch."""
    assert [results["resume"] for results in both] == [[True], [True, True]]


def test_a_process_that_is_stopped_is_reported_by_its_rank(both):
    """Rank 0 holds the store through which they hear of each other. No thread stays behind."""
    said, threads = both[1]["silence"]
    for rank in (0, 1):
        silent, again = (
            [i for i, words in enumerate(said) if words.startswith(f"rank {rank}") and part in words]
            for part in ("has not answered", "answers again")
        )
        assert silent and again and silent[0] < again[0]
    assert threads == [0, 0]
