"""Processes side by side: order, failures, and what ends them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from d3etr_hf.errors import ComparisonError, FolderInUseError
from d3etr_hf.runs import run_pool
from d3etr_hf.runs.folder_lock import holding
from d3etr_hf.runs.run_pool import Job, last_line, run_jobs

REPOSITORY = Path(__file__).resolve().parents[2]
# "START name" and "END name" with the time, around a wait for a file that a test may hold back
WORK = """
import os, sys, time
name, journal, gate = sys.argv[1:]
def note(what):
    with open(journal, "a") as file:
        file.write(f"{what} {name} {os.environ['OMP_NUM_THREADS']}\\n")
note("START")
while gate and not os.path.exists(gate):
    time.sleep(0.02)
note("END")
"""


@pytest.fixture
def job(tmp_path):
    """Makes jobs that keep a journal, `tmp_path/journal`."""

    def make(name: str, *needs: str, gate: str = "", script: str = WORK) -> Job:
        command = [sys.executable, "-c", script, name, str(tmp_path / "journal"), gate and str(tmp_path / gate)]
        return Job(name, command, tmp_path / "logs" / f"{name}.log", needs)

    return make


def journal(tmp_path) -> list[str]:
    return [line.removesuffix(" 1") for line in (tmp_path / "journal").read_text().splitlines()]


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def test_one_worker_runs_in_order_and_a_job_after_what_it_needs(job, tmp_path):
    """What it needs and is not among the jobs is there already."""
    done = []
    jobs = [job("late", "done before", "teacher"), job("first", "done before"), job("teacher"), job("last")]
    assert run_jobs(jobs, 1, lambda each: done.append(each.name)) == {}
    assert done == ["first", "teacher", "late", "last"]
    assert journal(tmp_path) == [f"{what} {name}" for name in done for what in ("START", "END")]


def test_a_second_worker_does_not_wait_for_the_first(job, tmp_path):
    """While the teacher trains, what does not need it is run; the gate is opened by the last of those."""

    def finish(each):
        if each.name == "other":
            (tmp_path / "gate").touch()

    run_jobs([job("teacher", gate="gate"), job("taught", "teacher"), job("other")], 2, finish)
    lines = journal(tmp_path)
    assert lines.index("END other") < lines.index("END teacher") < lines.index("START taught")


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_run_at_once_than_workers(job, workers, monkeypatch):
    """Processes that are still running when they are first looked at."""
    under_way = []

    class Process:
        returncode = 0

        def __init__(self, *_):
            self.looks = iter([None, 0])
            under_way.append(under_way[-1] + 1 if under_way else 1)

        def poll(self):
            status = next(self.looks)
            if status is not None:
                under_way.append(under_way[-1] - 1)
            return status

    monkeypatch.setattr(run_pool, "start", Process)
    monkeypatch.setattr(run_pool, "SECONDS_BETWEEN_LOOKS", 0)
    assert run_jobs([job(name) for name in "abcde"], workers, lambda each: None) == {}
    assert max(under_way) == workers and under_way[-1] == 0


def test_a_job_that_cannot_begin_fails_and_the_others_run(job, tmp_path):
    def begin(each):
        if each.name == "bad":
            raise ComparisonError("it cannot be known how long it is")

    failures = run_jobs([job("bad"), job("taught", "bad"), job("other")], 1, lambda each: None, begin=begin)
    assert failures == {"bad": "it cannot be known how long it is", "taught": "not started, since bad failed"}
    assert journal(tmp_path) == ["START other", "END other"]


def test_a_job_whose_log_cannot_be_written_fails_and_the_others_run(job, tmp_path):
    (tmp_path / "logs" / "bad.log").mkdir(parents=True)
    failures = run_jobs([job("other"), job("bad")], 2, lambda each: None)
    assert list(failures) == ["bad"] and "bad.log cannot be written (Is a directory)" in failures["bad"]
    assert journal(tmp_path) == ["START other", "END other"]


def test_a_failure_is_shown_and_keeps_back_only_what_needs_it(job, tmp_path, capsys):
    bad = job("bad", script="import sys\nprint('reading', end='\\r')\nprint('no data at all\\n')\nsys.exit(3)")
    jobs = [bad, job("taught", "done before", "bad"), job("pupil", "taught"), job("other")]
    refused = job("refused", script="")

    def finish(each):
        if each is refused:
            raise ComparisonError("refused: it left nothing")

    failures = run_jobs([*jobs, refused], 2, finish)
    assert failures == {
        "bad": f"ended with status 3: no data at all (all of it: {bad.log})",
        "taught": "not started, since bad failed",
        "pupil": "not started, since taught failed",
        "refused": "refused: it left nothing",
    }
    assert journal(tmp_path) == ["START other", "END other"]
    assert "bad failed: ended with status 3: no data at all" in capsys.readouterr().err


def test_a_log_grows(job):
    """What a run said before it was stopped stays."""
    talking = job("talking", script="print('hello')")
    for _ in range(2):
        run_jobs([talking], 1, lambda each: None)
    assert talking.log.read_text() == "hello\nhello\n"


def test_the_last_line_that_says_something(tmp_path):
    log = tmp_path / "log"
    log.write_text("first\n 3/9 [00:01]\r 9/9 [00:02]\n\n  \n")
    assert last_line(log) == "9/9 [00:02]"
    log.write_text("\n")
    assert last_line(log) == "it printed nothing"


def is_alive(process: int) -> bool:
    """Not so of one that has ended and that nobody has asked."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


COMPARE = """
import sys
from pathlib import Path
from d3etr_hf.runs.folder_lock import holding
from d3etr_hf.runs.run_pool import Job, run_jobs
folder, script = Path(sys.argv[1]), sys.argv[2]
jobs = [Job(name, [sys.executable, "-c", script, str(folder / name)], folder / f"{name}.log") for name in "ab"]
with holding(folder / "runs", "another d3etr compare") as descriptor:
    run_jobs(jobs, 2, lambda job: None, descriptor)
"""
SLEEP = """
import os, sys, time
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
def test_processes_end_with_their_parent_or_keep_its_place(tmp_path, how):
    """A parent that was killed outright cannot end them: nobody may start the same runs beside them then."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", COMPARE, str(tmp_path), SLEEP]
    # tests that run in a shell's background inherit a Ctrl-C that is ignored
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    parent = subprocess.Popen(command, env=environment, preexec_fn=listening)
    files = [tmp_path / "a", tmp_path / "b"]
    wait_for(lambda: all(file.exists() for file in files))
    children = [int(file.read_text()) for file in files]
    assert all(map(is_alive, children))
    in_use = (
        f"runs: another d3etr compare is at work there .process {parent.pid} on .*, or one that it has left behind"
    )
    with pytest.raises(FolderInUseError, match=in_use), holding(tmp_path / "runs", "another d3etr compare"):
        pass
    parent.send_signal(how)
    parent.wait(30)
    if how == signal.SIGKILL:
        with pytest.raises(FolderInUseError, match="left behind"), holding(tmp_path / "runs", "a call"):
            pass
        for child in children:
            os.kill(child, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, children)))
    with holding(tmp_path / "runs", "a call"):
        pass


def test_a_fork_does_not_keep_the_place_of_a_run_that_has_ended(tmp_path):
    """Workers of a data loader are forks, and outlive a run that was killed for some seconds."""
    (reading, writing), (ready, at_work) = os.pipe(), os.pipe()
    with holding(tmp_path, "a run"):
        if (child := os.fork()) == 0:
            os.close(writing)
            os.write(at_work, b"!")
            os.read(reading, 1)  # until the test has ended
            os._exit(0)
        os.read(ready, 1)
    try:
        with holding(tmp_path, "a run"):
            pass
    finally:
        os.close(writing)
        os.waitpid(child, 0)
