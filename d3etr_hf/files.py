"""What may be opened."""

import errno
import os
import stat
from pathlib import Path

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
