"""Signals through `accelerate launch`: a checkpoint, few lines, the command that goes on, and no orphan."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d3etr_hf.data.shapes import make_shapes
from tests.shapes_fixture import SIDE
from tests.tiny import small_image_processor, tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = (
    "--max_steps 100000 --per_device_train_batch_size 2 --logging_steps 1 --save_strategy no --report_to none "
    "--use_cpu true --disable_tqdm true"
)
# of two processes the launcher hands on what they got, too; a launcher of one hands on nothing and ends
CASES = {
    "everybody, two processes": ("--multi_gpu --num_processes 2 --main_process_port 0", signal.SIGTERM, True),
    "the launcher alone, one process": ("--num_processes 1", signal.SIGTERM, False),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_shapes(folder / "data", 8, 3, image_size=SIDE, progress=False)
    tiny_model(2).save_pretrained(folder / "model")
    small_image_processor().save_pretrained(folder / "model")
    return folder


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for as Linux shows them")
@pytest.mark.parametrize("case", CASES)
def test_signal_through_the_launcher(student, tmp_path, case):
    options, number, to_everybody = CASES[case]
    output, log = tmp_path / "run", tmp_path / "log"
    called = f"accelerate launch {options} --num_machines 1 --mixed_precision no --dynamo_backend no scripts/train.py "
    called += f"--model {student / 'model'} --data_folder {student / 'data'} --output_dir {output} {OPTIONS}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    program, *arguments = shlex.split(called)
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    with log.open("wb") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=REPOSITORY)
    try:
        wait_until(lambda: log.read_text().count("'loss'") > 1 or launcher.poll() is not None)
        before = len(log.read_text())
        for process in processes_of(output) if to_everybody else [launcher.pid]:
            os.kill(process, number)
        assert launcher.wait(timeout=60) != 0
        wait_until(lambda: not processes_of(output))
    finally:
        for process in processes_of(output):
            os.kill(process, signal.SIGKILL)
    said = log.read_text()[before:].splitlines()
    ours = [line for line in said if line.startswith(("d3etr", "accelerate", number.name))]
    (checkpoint,) = output.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists() and not (output / "results.json").exists()
    assert ours[-1] == called and f"{checkpoint}; to go on:" in ours[-2] and len(ours) <= 3
    assert not any("Error" in line for line in said)


def processes_of(output: Path) -> list[int]:
    """Those that were called with this folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text().split("\0")
        except OSError:  # it has ended
            continue
        if str(output) in words:
            found.append(int(place.name))
    return found


def wait_until(is_so, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
