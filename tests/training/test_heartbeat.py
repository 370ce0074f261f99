"""Who says that a process fell silent, and when; the store and SIGSTOP are in tests/test_distributed.py."""

import threading
import time

import pytest
import torch

from d3etr_hf.training import heartbeat as heartbeat_module
from d3etr_hf.training.heartbeat import LEFT, MISSED, _Heartbeat

RANKS = 3


@pytest.fixture
def begin(monkeypatch):
    """Makes the heartbeat of one of three ranks, whose threads keep still."""
    store, begun = torch.distributed.HashStore(), []
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *_, **__: store)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: RANKS)
    for name, value in (("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)

    def start(rank: int) -> _Heartbeat:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        begun.append(_Heartbeat(60, interval=3600))
        return begun[-1]

    yield start
    for heartbeat in begun:
        heartbeat.end()


def look(heartbeat: _Heartbeat, rounds, silent=(), word="7 process 3 on node") -> None:
    """Have it look as often as there are rounds, in which some ranks say the same all the time."""
    for number in rounds:
        heartbeat._look([word if rank in silent else f"{number} process 1" for rank in range(RANKS)])


def test_one_of_the_others_says_once_who_has_missed_so_many_beats(begin, caplog):
    first, second = begin(0), begin(1)
    look(first, range(MISSED), silent=[2])  # the first of them was seen
    look(second, range(MISSED), silent=[2])
    assert not caplog.text
    look(first, range(100, 120), silent=[2])
    look(second, range(100, 120), silent=[2])
    (record,) = caplog.records
    assert record.getMessage().startswith("rank 2 (process 3 on node) has not answered for 32400 s")
    look(first, range(200, 202))
    look(second, range(200, 202))
    assert [each.getMessage() for each in caplog.records[1:]] == ["rank 2 answers again"]


def test_the_second_speaks_where_the_first_is_silent(begin, caplog):
    for rank in (1, 2):
        look(begin(rank), range(20), silent=[0])
    assert [each.getMessage()[:6] for each in caplog.records] == ["rank 0"]


def test_nobody_misses_one_that_took_its_leave(begin, caplog):
    look(begin(0), range(20), silent=[2], word=LEFT)
    look(begin(1), range(20), silent=[0, 2], word=LEFT)
    assert not caplog.text


def test_an_attempt_is_not_answered_for_by_the_one_before(begin, monkeypatch):
    """Its launcher keeps the store."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    before = begin(0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not set(before.keys) & set(begin(1).keys) and len(set(before.keys)) == RANKS


def test_none_of_its_threads_outlives_it(begin, monkeypatch):
    """One that is in a call to the store while Python shuts down aborts the process."""
    heartbeat = begin(0)
    entered, store = threading.Event(), heartbeat.store

    class Slow:
        def set(self, key, value):
            entered.set()
            time.sleep(1.0)
            store.set(key, value)

    heartbeat.store, heartbeat.interval = Slow(), 0.01
    heartbeat.end()
    assert entered.is_set() and not any(thread.is_alive() for thread in heartbeat.threads)
    assert store.get(heartbeat.keys[0]) == LEFT.encode()


def test_a_store_that_never_answers_holds_nobody_back(begin, monkeypatch):
    """Its calls have no time limit: the launcher that holds it may be stopped, or its machine gone."""
    heartbeat, answer = begin(0), threading.Event()

    class Stopped:
        def set(self, key, value):
            answer.wait(30)

    monkeypatch.setattr(heartbeat_module, "STORE_TIMEOUT", 0.2)
    heartbeat.store = Stopped()
    start = time.monotonic()
    heartbeat.end()
    assert time.monotonic() - start < 10 and any(thread.is_alive() for thread in heartbeat.threads)
    answer.set()
