"""Signals through `accelerate launch`: a checkpoint, few lines, the command that goes on, and no orphan."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from d3etr_hf.cli import signals
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import TrainingStopped
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
        wait_until(lambda: log.read_text().count(": loss ") > 1 or launcher.poll() is not None)
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


def trainer_that_stops(output: str = "nowhere") -> SimpleNamespace:
    stop = SimpleNamespace(asked=False, stopped=False, orphaned=False)
    args = SimpleNamespace(output_dir=output)
    return SimpleNamespace(stop=stop, is_world_process_zero=lambda: True, args=args)


@pytest.mark.parametrize("later", [False, True])
def test_a_second_signal_ends_it_at_once_unless_it_was_handed_on(monkeypatch, capfd, later):
    ended = []
    trainer, number = trainer_that_stops(), signal.SIGUSR1
    monkeypatch.setattr(signals, "HANDED_ON", -1.0 if later else 60.0)
    monkeypatch.setattr(signal, "raise_signal", lambda n: ended.append((n, signal.getsignal(n))))
    with signals.stopping_at_signals(trainer):
        for _ in range(2):
            os.kill(os.getpid(), number)
            wait_until(lambda: trainer.stop.asked)
    assert ended == ([(number, signal.SIG_DFL)] if later else [])
    said = capfd.readouterr().err
    assert said.count("SIGUSR1: stopping after this step") == 1
    assert ("ended at once: nothing was kept, since no checkpoint had been written" in said) is later


def test_ctrl_c_tells_what_is_kept(tmp_path):
    """Before training's steps and after them; nothing is claimed of a checkpoint that is not whole."""
    (tmp_path / "checkpoint-9").mkdir()

    def interrupt() -> str:
        with pytest.raises(TrainingStopped) as caught, signals.saying_what_is_kept(tmp_path):
            raise KeyboardInterrupt
        assert caught.value.exit_code == 130
        return str(caught.value)

    assert interrupt().startswith("interrupted: nothing was kept, since no checkpoint had been written; the same call")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "manifest.json").touch()
    assert interrupt() == (
        f"interrupted: what came after {tmp_path / 'checkpoint-4'} is lost; the same call goes on from there"
    )


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping_at_signals(trainer_that_stops()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_fork_of_the_process_ends_as_any_other():
    """A data loader's, before it has handlers of its own."""
    with signals.stopping_at_signals(trainer := trainer_that_stops()):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM and not trainer.stop.asked


@pytest.mark.parametrize(
    ("processes", "expected"), [(None, ["d3etr", "train", "a b"]), (2, ["d3etr", "train", "a b"]), (4, None)]
)
def test_no_command_is_told_of_several_machines(monkeypatch, processes, expected):
    """Each has another one."""
    monkeypatch.setattr("sys.argv", ["/bin/d3etr train", "a b"])
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes and 2)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert signals._command() == expected
