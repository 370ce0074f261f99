"""The licence of a model, and those of the models that it learned from or started from, as their cards tell them."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from transformers.utils import logging

from d3etr_hf.errors import PublishError, one_line

logger = logging.get_logger(__name__)

CARD = "README.md"
METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # of a licence on the Hub
EXAMPLES = "apache-2.0, mit or other"


def license_in(folder: str | Path) -> str | None:
    """The licence that the card in a folder tells, by the Hub's identifier; None where it tells none."""
    path = Path(folder) / CARD
    if not path.is_file():
        return None
    try:
        metadata = METADATA.match(path.read_text(encoding="utf-8-sig"))
        told = yaml.safe_load(metadata[1]) if metadata else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        logger.warning(f"{path}: its licence cannot be read ({one_line(error)})")
        return None
    licenses = told.get("license") if isinstance(told, dict) else None
    listed = licenses if isinstance(licenses, list) else [licenses]
    return ", ".join(listed) if listed and all(isinstance(each, str) and each for each in listed) else None


def licenses_of(**folders: str | None) -> dict[str, str]:
    """Role → licence, of those of the folders whose cards tell one."""
    found = {role: license_in(folder) for role, folder in folders.items() if folder}
    return {role: told for role, told in found.items() if told is not None}


def require_license(folder: Path, sources: Mapping[str, str]) -> None:
    """Before a model leaves the machine: whether its card tells what may be done with it.

    Args:
        folder: of the model.
        sources: role → licence of the models that it comes of, which the error mentions.

    Raises:
        PublishError: it tells none.
    """
    if license_in(folder) is None:
        raise PublishError(f"{without_license(folder, sources)} (in Python license=...)")


def ask_for_license(folder: Path, sources: Mapping[str, str]) -> str | None:
    """What a person at the terminal answers; None where there is nobody, or no answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    print(f"{without_license(folder, sources)}, or type it here: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def without_license(folder: Path, sources: Mapping[str, str]) -> str:
    """That a model has no licence, and what to do, with the licences of the models that it comes of."""
    named = {"teacher": "its teacher's", "started_from": "that of the model it started from"}
    told = [f"{named[role]} is {license}" for role, license in sources.items()]
    of_sources = f" ({'; '.join(told)})" if told else ""
    return (
        f"{folder} has no licence{of_sources}, without which nobody may use the model: "
        f"give one by --license, such as {EXAMPLES}"
    )
