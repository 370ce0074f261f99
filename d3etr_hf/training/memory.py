"""How much memory this process takes at its peak, and how much it may take: of a GPU, or of the machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

GIB = 2**30
SECONDS_BETWEEN_LOOKS = 0.001


class PeakMemory:
    """The most memory that this process holds while a block runs: what is allocated on a GPU, or what is resident.

    Resident memory is looked at by a thread: the operating system's own high-water mark cannot be taken back, and
    loading a model may have set it.

    Attributes:
        bytes: the most so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = held_memory(device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context that counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device))
            return
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _watch(self, ended: threading.Event) -> None:
        process = psutil.Process()
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            self.bytes = max(self.bytes, process.memory_info().rss)


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds now: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def memory_to_be_had(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process can hold at most, what it holds already included.

    Args:
        device: a GPU; of a CPU the machine's memory counts, and what control groups (containers, SLURM) leave of it.
        processes: that share the machine's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = min([psutil.virtual_memory().available, *rooms_in_control_groups()])
    return held_memory(device) + free // processes


def ran_out_of_memory(error: Exception) -> bool:
    """Whether this is what a library raises where memory does not suffice."""
    return should_reduce_batch_size(error)


def rooms_in_control_groups(
    mounted: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Bytes that are left below each memory limit that Linux sets this process; a group's cached files count as left.

    Other systems set none, and a group that cannot be read counts as one without a limit.

    Args:
        mounted: where the groups are.
        of_process: which of them are this process's.
    """
    try:
        lines = of_process.read_text().splitlines()
    except OSError:  # another system than Linux, or one that does not tell
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            rooms += _room(folder, *names)
            if folder == top:
                break
    return rooms


def _room(folder: Path, limit: str, usage: str, cached: str) -> list[int]:
    """The room in one group; none where it has no limit, or cannot be seen, as from within a container."""
    try:
        if (most := (folder / limit).read_text().strip()) == "max":
            return []
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [int(most) - int((folder / usage).read_text()) + int(statistics.get(cached, 0))]
    except OSError:
        return []
