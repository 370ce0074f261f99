"""One call at a time at work in a folder."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from d3etr_hf.errors import FolderInUseError
from d3etr_hf.files import write_errors

logger = logging.get_logger(__name__)

LOCK = "lock"


@contextmanager
def holding(folder: Path, occupant: str) -> Iterator[int]:
    """Hold a folder against other processes, and give the descriptor of the lock.

    The system takes the lock from a process that ends, however it does. Processes that are started with the descriptor
    hold it too: one that outlives its parent, which was killed, keeps a second call from starting the same run beside
    it. Forks without one of their own do not: a data loader's workers may outlive a run for a moment.

    Args:
        folder: made if it is not there.
        occupant: what else may be at work there, as the error calls it.

    Raises:
        FolderInUseError: another process holds it.
        WriteError: the folder cannot be made or written.
    """
    import fcntl  # which Windows has not: what imports this module must work there

    path = folder / LOCK
    with write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(100).strip() or "a process"
            raise FolderInUseError(
                f"{folder}: {occupant} is at work there ({holder}, or one that it has left behind): wait until it has "
                "ended, or end it"
            ) from None
        except OSError as error:
            logger.warning(
                f"{path} cannot be locked ({error.strerror}): see to it yourself that no second call works there"
            )
        os.register_at_fork(after_in_child=file.close)
        with write_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        try:
            yield file.fileno()
        finally:
            file.truncate(0)
