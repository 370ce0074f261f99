"""Processes that train together tell each other that they are alive; one that falls silent is named by its rank.

PyTorch's own watchdogs end a run whose collective operations take too long, half an hour by default, and do not know
whose fault it is. Here a thread beats in the store by which the processes found each other, whatever training does:
it keeps still with the whole process (or in a call that lets no thread of Python run), so that long evaluations,
saving and loading are no alarms.
"""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed
from transformers.utils import logging

from d3etr_hf.errors import one_line

logger = logging.get_logger(__name__)

# seconds between two beats, and beats that are missed before it is said
INTERVAL, MISSED = 5.0, 9
STORE_TIMEOUT = 60.0  # seconds
LEFT = "left"

_watching = threading.Lock()


@contextmanager
def watching_processes(patience: float, interval: float = INTERVAL) -> Iterator[None]:
    """The context in which a process of this group that is stopped, or whose machine is gone, is named in a warning.

    The others go on waiting, until it answers again or PyTorch gives up. One of them speaks for all. Does nothing in a
    process that is alone, within another such context, and where no variables say at which store processes met.

    Args:
        patience: seconds after which PyTorch gives up a collective operation.
        interval: seconds between two beats.
    """
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not group or torch.distributed.get_world_size() == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield
        return
    if not _watching.acquire(blocking=False):
        yield
        return
    try:
        heartbeat = _begin(patience, interval)
        try:
            yield
        finally:
            if heartbeat is not None:
                heartbeat.end()
    finally:
        _watching.release()


def _begin(patience: float, interval: float) -> "_Heartbeat | None":
    try:
        return _Heartbeat(patience, interval)
    except (torch.distributed.DistError, ValueError) as error:
        logger.warning(
            f"a process that is stopped will not be noticed: no store is at MASTER_ADDR ({one_line(error)})"
        )
        return None


class _Heartbeat:
    """Two threads: one beats and looks for the others' beats, one sees to it that the store answers."""

    def __init__(self, patience: float, interval: float):
        self.rank, ranks = torch.distributed.get_rank(), range(torch.distributed.get_world_size())
        self.interval = interval
        self.others_wait = f"the others wait for it, at most {patience:.0f} s (ddp_timeout)"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher keeps the store over its attempts
        self.keys = [f"d3etr_hf/alive/{attempt}/{rank}" for rank in ranks]
        self.rounds = 0
        self.words = ["" for _ in ranks]
        self.missed = [0 for _ in ranks]
        self.reported: set[int] = set()
        self.ended = threading.Event()
        # a connection of its own: threads wait for one another in that of the process group
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = torch.distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT))
        self._say_alive()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """Take leave, so that nobody misses this process.

        A slow store is waited for: a thread that comes back from a call to it while Python shuts down aborts the
        process. One that is stopped, or its machine gone, may never answer.
        """
        self.ended.set()
        until = time.monotonic() + STORE_TIMEOUT
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _say_alive(self) -> None:
        self.store.set(self.keys[self.rank], f"{self.rounds} process {os.getpid()} on {platform.node()}")

    def _beat(self) -> None:
        try:
            while not self.ended.wait(self.interval):
                self.rounds += 1
                self._say_alive()
                if self.store.check(self.keys):  # all have begun
                    self._look([words.decode() for words in self.store.multi_get(self.keys)])
            self.store.set(self.keys[self.rank], LEFT)
        except torch.distributed.DistError:
            self.ended.set()  # the store is gone, with the launcher or the process that held it: so is the run

    def _look(self, words: list[str]) -> None:
        """Count the beats that each has missed; not seconds, for a process that was stopped itself has seen none."""
        for rank, word in enumerate(words):
            self.missed[rank] = self.missed[rank] + 1 if word == self.words[rank] and word != LEFT else 0
        self.words = words
        for rank in [rank for rank in self.reported if self.missed[rank] == 0]:
            self.reported.remove(rank)
            logger.warning(f"rank {rank} answers again")
        speaker = min(rank for rank, word in enumerate(words) if word != LEFT and self.missed[rank] < MISSED)
        for rank, missed in enumerate(self.missed):
            if missed >= MISSED and rank not in self.reported and speaker == self.rank:
                self.reported.add(rank)
                self._say_silent(f"rank {rank} ({words[rank].partition(' ')[2]})", self.others_wait)

    def _watch_store(self) -> None:
        """Where the store stands still, so does the thread that beats."""
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holder = f"the launcher at {os.environ['MASTER_ADDR']}" if by_launcher else "rank 0"
        speaks = self.rank == (0 if by_launcher else 1)
        rounds = missed = 0
        while not self.ended.wait(self.interval):
            if rounds != self.rounds:
                if speaks and missed >= MISSED:
                    logger.warning(f"{holder} answers again")
                rounds, missed = self.rounds, 0
            else:
                missed += 1
                if speaks and missed == MISSED:
                    left = "until it answers no other process that stops is noticed"
                    self._say_silent(holder, left if by_launcher else self.others_wait)

    def _say_silent(self, who: str, consequence: str) -> None:
        seconds = MISSED * self.interval
        logger.warning(
            f"{who} has not answered for {seconds:.0f} s: it may be stopped, or its machine gone; {consequence}"
        )
