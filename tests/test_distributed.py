"""Two processes against one: evaluation, the first step's gradients and the log (HF_NOTES 9, 13 and 16)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from tests.shapes_fixture import SIDE
from tests.tiny import tiny_model

WORKER = Path(__file__).with_name("distributed_worker.py")


def run_worker(processes: int, output: Path, *arguments) -> dict:
    launch = [sys.executable]
    if processes > 1:
        # what `accelerate launch` starts under configs/accelerate/cpu_two_processes.yaml
        launch += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            "0",
            "--standalone",
        ]
    command = [*launch, str(WORKER), str(output), *(str(argument) for argument in arguments)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    return torch.load(output)


# number of queries of the student of each family; seven of DETR's would find nothing
FAMILIES = {"conditional_detr": 7, "detr": 60}


@pytest.fixture(scope="module", params=["pairs", "boxes"])
def launched(request, tmp_path_factory):
    """The same four images: in one process, and in two of two images each; every family in the same launch."""
    folder = tmp_path_factory.mktemp("distributed")
    shapes = make_shapes(folder / "shapes", 12, 11, image_size=SIDE, progress=False)
    for model_type, queries in FAMILIES.items():
        tiny_model(2, model_type, num_queries=queries).save_pretrained(folder / "checkpoints" / model_type)
    one = run_worker(1, folder / "one.pt", shapes, folder / "run1", 4, folder / "checkpoints", request.param)
    two = run_worker(2, folder / "two.pt", shapes, folder / "run2", 2, folder / "checkpoints", request.param)
    return one, two


@pytest.fixture(params=FAMILIES)
def both(request, launched):
    one, two = (results[request.param] for results in launched)
    assert (one["world"], two["world"]) == (1, 2)
    return one, two


def test_evaluation_is_the_same_on_two_processes(both):
    """11 images in batches of 3: the last batch is ragged over the processes."""
    one, two = (result["metrics"] for result in both)
    names = [name for name in one if name.startswith(("eval_AP", "eval_AR"))]
    assert len(names) > 8 and one["eval_AR_100"] > 0
    for name in names:
        assert two[name] == pytest.approx(one[name], abs=1e-9), name


def test_first_gradients_are_the_same_on_two_processes(both):
    """The stock detection loss would be twice too large: it divides the boxes by the world size twice."""
    one, two = (result["gradients"] for result in both)
    assert one.keys() == two.keys() and len(one) > 100
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_logged_terms_are_the_same_on_two_processes(both):
    one, two = (result["log"] for result in both)
    for name, value in one.items():
        if name.startswith("loss"):
            assert two[name] == pytest.approx(value, rel=1e-4), name
