"""Peak memory of what is known to take so much, and the limits of control groups."""

import time

import psutil
import pytest
import torch

from d3etr_hf.training import memory
from d3etr_hf.training.memory import PeakMemory, held_memory, memory_to_be_had, rooms_in_control_groups

CPU, MEBIBYTE = torch.device("cpu"), 2**20


def test_the_peak_is_seen_although_it_is_over():
    before, peak = held_memory(CPU), PeakMemory(CPU)
    with peak.watching():
        held = torch.ones(200 * MEBIBYTE // 4)
        time.sleep(0.05)
        del held
    assert peak.bytes - before == pytest.approx(200 * MEBIBYTE, rel=0.05)
    assert held_memory(CPU) - before < 20 * MEBIBYTE


def make_group(folder, names, limit, usage, cached) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names[:2], (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


VERSIONS = {
    1: ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    2: ("", ("memory.max", "memory.current", "inactive_file")),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_group_above_counts(tmp_path, version):
    """SLURM limits a job and each of its steps; what is only cached could be had."""
    place, names = VERSIONS[version]
    top, of_process = tmp_path / "groups" / place, tmp_path / "cgroup"
    make_group(top / "job" / "step", names, 1000, 300, 100)
    make_group(top / "job", names, "max" if version == 2 else 2**63 - 1, 0, 0)
    of_process.write_text(f"3:cpu,cpuacct:/job\n{'4:memory' if version == 1 else '0:'}:/job/step\n")
    rooms = rooms_in_control_groups(tmp_path / "groups", of_process)
    assert min(rooms) == 800 and len(rooms) == (1 if version == 2 else 2)


def test_a_container_sees_its_own_group_as_the_top(tmp_path):
    """The path that the process is told leads nowhere within it."""
    make_group(tmp_path / "groups", VERSIONS[2][1], 1000, 400, 0)
    (tmp_path / "cgroup").write_text("0::/../../docker/1234\n")
    assert rooms_in_control_groups(tmp_path / "groups", tmp_path / "cgroup") == [600]
    assert rooms_in_control_groups(tmp_path / "groups", tmp_path / "absent") == []


def test_a_group_that_cannot_be_read_sets_no_limit(tmp_path):
    """What is a folder in place of a file fails as one without permission does, which root has everywhere."""
    names = VERSIONS[2][1]
    make_group(tmp_path / "groups", names, 1000, 400, 0)
    make_group(tmp_path / "groups" / "job", names, 500, 100, 0)
    (tmp_path / "cgroup").write_text("0::/job\n")
    for name in names[:2]:
        (tmp_path / "groups" / "job" / name).unlink()
        (tmp_path / "groups" / "job" / name).mkdir()
        assert rooms_in_control_groups(tmp_path / "groups", tmp_path / "cgroup") == [600]
        (tmp_path / "groups" / "job" / name).rmdir()
        (tmp_path / "groups" / "job" / name).write_text("500")
    (tmp_path / "groups" / "job" / "memory.stat").unlink()
    assert rooms_in_control_groups(tmp_path / "groups", tmp_path / "cgroup") == [600]
    assert rooms_in_control_groups(tmp_path / "groups", tmp_path / "groups") == []


def test_without_limits_what_the_machine_has_available_counts(monkeypatch):
    """As on macOS and Windows, and in a group whose limit is "max"."""
    monkeypatch.setattr(memory, "rooms_in_control_groups", lambda: [])
    available = psutil.virtual_memory().available
    assert memory_to_be_had(CPU) - held_memory(CPU) == pytest.approx(available, rel=0.1)


def test_processes_share_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "rooms_in_control_groups", lambda: [1000 * MEBIBYTE])
    held = psutil.Process().memory_info().rss
    assert memory_to_be_had(CPU) - held == pytest.approx(1000 * MEBIBYTE, rel=0.05)
    assert memory_to_be_had(CPU, processes=4) - held == pytest.approx(250 * MEBIBYTE, rel=0.05)
