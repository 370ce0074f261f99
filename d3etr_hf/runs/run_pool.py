"""Several commands at once, each a process with one thread; one that fails does not end the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from d3etr_hf.errors import UserError
from d3etr_hf.files import write_errors

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 20  # that a process has to end itself before it is killed


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: unique among the jobs.
        command: program and arguments.
        log: gets what it prints, after what is there.
        needs: the names of jobs that must have ended well before; one that is not among the jobs has.
    """

    name: str
    command: list[str]
    log: Path
    needs: tuple[str, ...] = ()


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    finish: Callable[[Job], None],
    descriptor: int | None = None,
    begin: Callable[[Job], None] = lambda job: None,
) -> dict[str, str]:
    """Run all jobs, in their order as far as they need not wait for others; show how many are done.

    Ctrl-C and SIGTERM end the processes that are under way.

    Args:
        jobs: in the order in which they are to start.
        workers: how many at once.
        finish: called when a job has ended with status 0; a UserError that it raises is a failure of the job.
        descriptor: an open file that every process inherits; see `folder_lock.holding`.
        begin: called before a job starts, when all that it needs has ended; a UserError fails the job likewise.

    Returns:
        Why jobs failed, by their names, in the order in which they did.
    """
    waiting = list(jobs)
    running: dict[str, subprocess.Popen] = {}
    failures: dict[str, str] = {}
    by_name = {job.name: job for job in jobs}
    with tqdm(total=len(jobs), desc="runs", unit="run", disable=not jobs) as bar, ending(running):
        while waiting or running:
            for job in [job for job in waiting if failures.keys() & set(job.needs)]:
                waiting.remove(job)
                cause = next(name for name in job.needs if name in failures)
                fail(job, f"not started, since {cause} failed", failures, bar)
            not_done = {*running, *failures, *(job.name for job in waiting)}
            ready = [job for job in waiting if not_done.isdisjoint(job.needs)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                try:
                    begin(job)
                    running[job.name] = start(job, descriptor)
                except UserError as error:
                    fail(job, str(error), failures, bar)
                    continue
                bar.set_postfix_str(", ".join(running))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                settle(by_name[name], running.pop(name).returncode, finish, failures, bar)
    return failures


def start(job: Job, descriptor: int | None = None) -> subprocess.Popen:
    """Start a job's process, on one thread: two that spin on both cores are many times slower than one each.

    Raises:
        WriteError: its log cannot be written.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with write_errors(job.log):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
    with log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if descriptor is None else (descriptor,),
        )


def settle(job: Job, status: int, finish: Callable[[Job], None], failures: dict[str, str], bar: tqdm) -> None:
    """Count a job that has ended as done or failed."""
    if status != 0:
        fail(job, f"ended with status {status}: {last_line(job.log)} (all of it: {job.log})", failures, bar)
        return
    try:
        finish(job)
    except UserError as error:
        fail(job, str(error), failures, bar)
        return
    bar.update()


def fail(job: Job, reason: str, failures: dict[str, str], bar: tqdm) -> None:
    """Keep and show why a job failed."""
    failures[job.name] = reason
    bar.write(f"{job.name} failed: {reason}", file=sys.stderr)
    bar.update()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextmanager
def ending(running: dict[str, subprocess.Popen]) -> Iterator[None]:
    """End the processes that are under way whatever happens, SIGTERM included."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
