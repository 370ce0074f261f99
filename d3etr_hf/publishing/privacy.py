"""What must not leave the machine with a model: tokens, and paths that tell whose machine it was.

Two nets: `anonymise` takes paths and secrets out of what is written for publication, `refuse_secrets` reads every byte
of every file before it is sent.
"""

import mmap
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

SECRET_NAME = re.compile(r"token|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)
TOKEN_SHAPE = rb"hf_[A-Za-z0-9]{30,}"
SHORTEST_SECRET = 8
# a machine's name without one of these could be any word
UNUSUAL_IN_WORDS = re.compile(r"[0-9_.-]")
BEGINNING_OF_OUTSIDE_PATH = re.compile(r"^(/|~|\.\.(/|$)|[A-Za-z]:[\\/]|\\\\)")
# what publishes a run is no part of what reproduces it, and may name an account
UNPUBLISHED_KEYS = re.compile(r"^(push_to_hub|hub_\w+|.*token.*|.*secret.*|.*passw.*|.*api_key.*)$")


class PrivacyError(RuntimeError):
    """A file that was to be published holds a secret, or a path of this machine."""


def secrets_of_this_machine() -> dict[str, re.Pattern[bytes]]:
    """What no published byte may hold: a description, which may be shown, and a pattern that finds it."""
    found = {
        f"the value of the environment variable {name}": re.escape(value.encode())
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET
    }
    if token := get_token():
        found["your Hugging Face token"] = re.escape(token.encode())
    # the lookbehind: "runs/data" holds no path "/data"
    names = {"the path of your home directory": str(Path.home()), "the path of the working directory": os.getcwd()}
    if UNUSUAL_IN_WORDS.search(socket.gethostname()):
        names["the name of this machine"] = socket.gethostname()
    for what, name in names.items():
        if name.strip("/\\"):  # "/" itself is in every file
            found[what] = rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w-])"
    found["what looks like a Hugging Face token"] = TOKEN_SHAPE
    return {what: re.compile(pattern) for what, pattern in found.items()}


def anonymise(value: Any) -> Any:
    """A copy of a configuration, or of measurements, that can be published.

    A path outside the working directory keeps its last part only; text that holds a secret, and entries that publish,
    are left out.
    """
    if isinstance(value, dict):
        kept = {key: anonymise(member) for key, member in value.items() if not UNPUBLISHED_KEYS.match(str(key))}
        return {key: member for key, member in kept.items() if member is not None or value[key] is None}
    if isinstance(value, list | tuple):
        return [anonymise(member) for member in value]
    if not isinstance(value, str):
        return value
    if BEGINNING_OF_OUTSIDE_PATH.match(value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return None if any(secret.search(value.encode()) for secret in secrets_of_this_machine().values()) else value


def refuse_secrets(paths: Iterable[Path]) -> None:
    """Read files to their last byte for what must not be published.

    Raises:
        PrivacyError: one of them holds a secret; the message names the file and what it is, not the secret.
    """
    secrets = secrets_of_this_machine()
    for path in paths:
        if path.stat().st_size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            held = [what for what, secret in secrets.items() if secret.search(content)]
        if held:
            raise PrivacyError(
                f"{path} holds {held[0]}, so nothing was uploaded: remove it from the file and publish again"
            )
