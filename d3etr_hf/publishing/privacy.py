"""What must not leave the machine with a model: tokens, and paths that tell whose machine it was.

Two nets: `anonymise` takes paths and secrets out of what is written for publication, and every text that is published
goes through it; `refuse_secrets` reads every byte of every file before it is sent.
"""

import mmap
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from d3etr_hf.errors import PrivacyError
from d3etr_hf.files import write_json

SECRET_NAME = re.compile(r"token(?!iz)|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)
TOKEN_SHAPE = rb"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}"
HOME_OF_SOMEBODY = rb"(?<![\w.-])[/\\](?:home|Users)[/\\][\w.-]+"
# a shorter value, or one that could be a word, is no secret: APP_TOKENS=distilled must not block every card
SHORTEST_SECRET, LONGEST_WORD = 8, 20
# a shorter path could be found by chance, or in text that means something else
SHORTEST_PATH = 5
# a machine's name without one of these could be any word
UNUSUAL_IN_WORDS = re.compile(r"[0-9_.-]")
OUTSIDE_PATH = re.compile(r"(?:^|[\s:=,;'\"(\[])(?:/|~|\.\.(?:[\\/]|$)|[A-Za-z]:[\\/]|\\\\)")
ABSOLUTE_PATH = re.compile(r"/|[A-Za-z]:[\\/]|\\\\")
# what publishes a run is no part of what reproduces it, and may name an account
UNPUBLISHED_KEYS = re.compile(r"^(push_to_hub|hub_\w+|.*token.*|.*secret.*|.*passw.*|.*api_key.*)$")
REMOVED = "(removed)"


def secrets_of_this_machine(
    more: Iterable[str | None] = (), places: Iterable[str] = ()
) -> dict[str, re.Pattern[bytes]]:
    """What no published byte may hold: a description, which may be shown, and a pattern that finds it.

    Args:
        more: further secrets, such as a token that was given as an argument.
        places: further paths of this machine.
    """
    found = {
        f"the value of the environment variable {name}": re.escape(value.encode())
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and _looks_secret(value)
    }
    tokens = [token for token in (get_token(), *more) if token]
    if tokens:
        found["your Hugging Face token"] = b"|".join(re.escape(token.encode()) for token in tokens)
    # the lookbehind: "runs/data" holds no path "/data"
    names = {"the path of your home directory": str(Path.home()), "the path of the working directory": os.getcwd()}
    names = {what: name for what, name in names.items() if len(name) >= SHORTEST_PATH}
    if UNUSUAL_IN_WORDS.search(socket.gethostname()):
        names["the name of this machine"] = socket.gethostname()
    for what, name in names.items():
        found[what] = rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w-])"
    if places := {*places}:
        paths = b"|".join(re.escape(place.encode()) for place in sorted(places))
        found["a path that the run was given"] = rb"(?<![\w.-])(?:" + paths + rb")(?![\w-])"
    found["the path of somebody's home directory"] = HOME_OF_SOMEBODY
    found["what looks like a Hugging Face token"] = TOKEN_SHAPE
    return {what: re.compile(pattern) for what, pattern in found.items()}


def _looks_secret(value: str) -> bool:
    return len(value) >= SHORTEST_SECRET and (len(value) >= LONGEST_WORD or any(map(str.isdigit, value)))


def anonymise(value: Any) -> Any:
    """A copy that can be published: a path outside the working directory keeps its last part only, text that holds a
    secret becomes "(removed)"; numbers, and the keys of dictionaries, stay as they are."""
    secrets = secrets_of_this_machine().values()

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(member) for key, member in value.items()}
        if isinstance(value, list | tuple):
            return [clean(member) for member in value]
        if not isinstance(value, str):
            return value
        if OUTSIDE_PATH.search(value) or OUTSIDE_PATH.search(os.path.normpath(value)):
            value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return REMOVED if any(secret.search(value.encode()) for secret in secrets) else value

    return clean(value)


def write_published_json(path: Path, content: Any) -> None:
    """Write content as JSON that may leave the machine: through `anonymise`, as whole as `write_json`."""
    write_json(path, anonymise(content))


def anonymise_configuration(configuration: dict) -> dict:
    """A run's configuration as it can be published: without what publishes it, and without secrets."""
    kept = {key: value for key, value in configuration.items() if not UNPUBLISHED_KEYS.match(key)}
    return {key: value for key, value in anonymise(kept).items() if value != REMOVED}


def absolute_paths_in(value: Any) -> set[str]:
    """The absolute paths among the texts in a configuration, without one of a single part, which tells nothing."""
    if isinstance(value, dict | list | tuple):
        members = value.values() if isinstance(value, dict) else value
        return set().union(*map(absolute_paths_in, members))
    if not isinstance(value, str) or not ABSOLUTE_PATH.match(value):
        return set()
    path = value.rstrip("\\/")
    return {path} if len(re.split(r"[\\/]+", path)) > 2 else set()


def refuse_secrets(paths: Iterable[Path], more: Iterable[str | None] = (), places: Iterable[str] = ()) -> None:
    """Read files to their last byte for what must not be published.

    Args:
        more, places: further secrets and paths, see `secrets_of_this_machine`.

    Raises:
        PrivacyError: one of them holds a secret; the message names the file and what it is, not the secret.
    """
    secrets = secrets_of_this_machine(more, places)
    for path in paths:
        if path.stat().st_size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            held = [what for what, secret in secrets.items() if secret.search(content)]
        if held:
            raise PrivacyError(
                f"{path} holds {held[0]}, so nothing was uploaded: remove it from the file, or from what the file is "
                "made of (an environment variable that is no secret can be unset), and publish again"
            )
