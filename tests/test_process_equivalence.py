"""The small part of scripts/process_equivalence.py: four processes, two, or accumulated batches are one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of the family that has most that is divided by what a whole step holds."""
    output = tmp_path_factory.mktemp("equivalence") / "differences.json"
    command = [sys.executable, "-W", "ignore", "scripts/process_equivalence.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--families", "d_fine", "--json", str(output)],
        check=True,
        cwd=REPOSITORY,
        env=environment,
        timeout=300,
    )
    return json.loads(output.read_text())


def test_processes_are_one_process(differences):
    """Three steps: ragged objects, processes without any, and none at all."""
    for layout in ("2 x 4", "4 x 2"):
        for case, row in differences.items():
            assert max(row[layout].values()) < 2e-5, (case, layout)


def test_what_is_approximate_over_accumulated_batches_stays_near(differences):
    """Batches without an object would halve the loss if each batch's pairs were counted by its images."""
    assert differences["d_fine"]["1 x 2 x 4"]["gradient"] < 1e-3
    assert 1e-5 < differences["d_fine, box distributions"]["1 x 2 x 4"]["gradient"] < 0.05
