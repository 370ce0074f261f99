"""Files: which may be opened, and how they are written so that neither a kill nor a full disk can spoil them."""

import difflib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from d3etr_hf.errors import DamagedFileError, WriteError, one_line, quoted

BLOCK = 2**20  # bytes that are read at once
UNFINISHED = ".unfinished"  # ends the name of a file that was being written when its process ended
OF_TORCH_SAVE = ("inline_container", "PytorchStreamWriter")  # in what it raises, a RuntimeError, where a write fails
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_file(path: str | Path) -> Path:
    """The path of a file, or of a link to one, that can be opened: opening a named pipe would wait for ever.

    Raises:
        OSError: nothing is there, or something else than a file; its `strerror` says what.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except ValueError as error:  # a character that no file's name has
        raise OSError(errno.EINVAL, f"no file has such a name: {error}") from None
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"it is {KINDS.get(kind, 'no file')}, not a file")
    return Path(path)


def nearest_place(path: str | Path) -> str:
    """What a path that is not there may have been meant to be, for a message: "; did you mean ...?", or nothing."""
    place = Path(path)
    there = place.parent
    while not os.path.isdir(there) and there != there.parent:
        there = there.parent
    try:
        names = os.listdir(there)
    except OSError:  # not ours to list
        return ""
    nearest = difflib.get_close_matches(place.relative_to(there).parts[0], names, n=1)
    return f"; did you mean {quoted(str(there / nearest[0]))}?" if nearest else ""


def make_folder(path: str | Path) -> Path:
    """A folder that is there, with those above it.

    Raises:
        WriteError: it cannot be made, as where a file has its name.
    """
    folder = Path(path)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Content as JSON; see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run may be stopped, and a machine switched off, at any moment.

    By one process at a time, which a lock or the place must see to.

    Raises:
        WriteError: it cannot be written; what stood there stands there still.
    """
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    with write_errors(path):
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)  # half a file takes the place that a full disk lacks
            raise
        flush_folder(path.parent)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the copy is whole or not there; see `write_whole`."""
    unfinished = target.with_name(f"{target.name}{UNFINISHED}")
    with write_errors(target):
        shutil.copyfile(source, unfinished)
        with unfinished.open("rb+") as file:  # Windows flushes nothing opened for reading alone
            os.fsync(file.fileno())
        unfinished.replace(target)
        flush_folder(target.parent)


def sha256_of(*paths: Path) -> str:
    """The hash of what files hold, one after the other, in hexadecimal digits; about a second a gigabyte.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        for block in blocks_of(path):
            digest.update(block)
    return digest.hexdigest()


def blocks_of(path: str | Path) -> Iterator[bytes]:
    """What a file holds, a block at a time. Raises: OSError: it cannot be read."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, as `os.fsync` has a file's content."""
    if os.name != "posix":
        return  # Windows opens no folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Within this context a write that fails is told as one error, whichever library wrote.

    Args:
        path: what is written, as the error calls it.

    Raises:
        WriteError: the disk is full, the place may not be written, and the like.
    """
    cause: Exception
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason, cause = error.strerror or str(error), error
    except SafetensorError as error:
        reason, cause = str(error), error
    except RuntimeError as error:
        if not any(name in str(error) for name in OF_TORCH_SAVE):
            raise
        reason, cause = "a write was cut off, as on a full disk", error
    else:
        return
    raise WriteError(
        f"{path} cannot be written ({one_line(reason, 200)}): free some space or make its folder writable, or choose "
        "another place; what was saved before is untouched, and the same call goes on from there"
    ) from cause


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds.

    Args:
        remedy: what to do if it is damaged, as the error says it.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFileError: it is cut off, empty or no JSON, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8; of lists in lists without end
        raise DamagedFileError(f"{path} is damaged, since it is no JSON ({error}): {remedy}") from None
