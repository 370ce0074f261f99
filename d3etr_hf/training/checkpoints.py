"""Whole checkpoints: what shows that all of one is on the disk, and the newest from which a run can go on.

A checkpoint's last file is its manifest: name, size and hash of every other. Without it, or with a file that is not as
the manifest has it, a checkpoint is not gone on from. Checkpoints of version 0.1 have no manifest; where none in a
folder has one, they count if all that is needed is there and can be read.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from d3etr_hf.errors import CheckpointError, one_line
from d3etr_hf.files import flush_folder, sha256_of, write_json

logger = logging.get_logger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
ASIDE = ".before"  # ends the name of a checkpoint while another of the same step is written
# of a checkpoint whose model alone is loaded
MODEL = ("config.json", "model*.safetensors")
# without one of these a run would go on otherwise than it stopped; `save_only_model` leaves the optimizer's out
NEEDED = (*MODEL, "optimizer.pt", "scheduler.pt", "rng_state*.pth", STATE)


def seal(folder: Path) -> None:
    """Have all files of a checkpoint on the disk, and then write its manifest: from now on it counts."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb+") as file:  # Windows flushes nothing that was opened for reading alone
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / MANIFEST, {"files": files})
    flush_folder(folder.parent)


def checkpoints_of(output: Path) -> list[Path]:
    """The checkpoints in an output folder, whole or not, the newest first."""
    found = [path for path in output.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def put_aside(output: Path) -> list[Path]:
    """Checkpoints that a kill left aside, see `ResumableTrainer`."""
    return list(output.glob(f"{PREFIX}*{ASIDE}"))


def was_saved(folder: Path) -> bool:
    """Whether a checkpoint was once there as a whole, so far as can be seen without reading it all."""
    if (folder / MANIFEST).exists():
        return True
    try:
        json.loads((folder / STATE).read_bytes())  # the last that Trainer writes
    except (OSError, ValueError):
        return False
    return True


def newest_whole_checkpoint(output: Path, with_best: bool = False) -> Path | None:
    """The checkpoint from which a run goes on.

    Newer ones that are not whole are named in one warning, with the reason of each.

    Args:
        output: the run's output folder.
        with_best: whether the best checkpoint so far, which is loaded at the end, must be whole, too.

    Returns:
        None where none was ever saved as a whole.

    Raises:
        CheckpointError: there were whole checkpoints, and none is left.
    """
    _take_back(output)
    passed_over: dict[Path, str] = {}
    for folder in checkpoints_of(output):
        reason = why_not_whole(folder, with_best=with_best)
        if reason is None:
            break
        passed_over[folder] = reason
    else:
        folder = None
    told = "; ".join(f"{path} is not whole: {reason}" for path, reason in passed_over.items())
    if folder is None and any(map(was_saved, passed_over)):
        raise CheckpointError(
            f"{output} has no checkpoint left from which the run can go on ({told}): remove "
            f"{'it' if len(passed_over) == 1 else 'them'} to start from the beginning, or choose another output_dir"
        )
    if passed_over:
        goes_on = "the run starts from the beginning" if folder is None else f"the run goes on from {folder}"
        logger.warning(f"{told}; {goes_on}")
    return folder


def _take_back(output: Path) -> None:
    """A kill while a step was saved once more left its first checkpoint aside: it counts until the other is whole."""
    for aside in put_aside(output):
        folder = aside.with_name(aside.name.removesuffix(ASIDE))
        if (folder / MANIFEST).exists():
            shutil.rmtree(aside)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)


def check_whole(folder: Path, needed: Sequence[str] = NEEDED, with_best: bool = False) -> None:
    """Raises: CheckpointError for a checkpoint that is not whole, or not there; see `why_not_whole`."""
    if reason := why_not_whole(folder, needed, with_best):
        raise CheckpointError(
            f"{folder} is no checkpoint from which a run can go on: {reason}; name another, or let the newest that is "
            "whole be found (leave resume_from_checkpoint out of a command; in Python: True)"
        )


def why_not_whole(folder: Path, needed: Sequence[str] = NEEDED, with_best: bool = False) -> str | None:
    """What keeps a run from going on from a checkpoint, in a few words; None if nothing does.

    Reads all of it: about two seconds a gigabyte.

    Args:
        needed: patterns of which each must match a file's name.
        with_best: see `newest_whole_checkpoint`.
    """
    if not folder.is_dir():
        return "it is no folder" if folder.exists() else "there is no such folder"
    sealed = (folder / MANIFEST).exists()
    try:
        listed = _read_manifest(folder) if sealed else {path.name: {} for path in folder.iterdir()}
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({one_line(error)})"
    for pattern in needed:
        if not any(fnmatch(name, pattern) for name in listed):
            return f"it holds no {pattern}"
    if not sealed and any((other / MANIFEST).exists() for other in checkpoints_of(folder.parent)):
        return f"it holds no {MANIFEST}, which is written last"
    for name, told in listed.items():
        if reason := _difference(folder / name, told) if sealed else unreadable(folder / name):
            return f"its {name} {reason}"
    return _why_best_is_not_whole(folder) if with_best else None


def _read_manifest(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / MANIFEST).read_bytes())
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(told, dict) for told in files.values()):
        raise ValueError("no files are listed")
    return files


def _difference(path: Path, told: dict) -> str | None:
    """How a file differs from what the manifest says of it."""
    if not path.is_file():
        return "is no file" if path.exists() else "is missing"
    size = path.stat().st_size
    if size != told.get("bytes"):
        return f"has {size} bytes instead of {told.get('bytes')}"
    try:
        same = sha256_of(path) == told.get("sha256")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "is not as it was saved"


def unreadable(path: Path) -> str | None:
    """Why a file cannot be read, as far as its own format can tell; None if it can."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as file:
                return "is damaged" if file.testzip() else None
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"cannot be read ({one_line(error)})"
    return None


def checkpoint_beside(folder: Path, recorded: str) -> Path:
    """A checkpoint that a trainer's state names: in this output folder, which may have been moved since."""
    here = folder / Path(recorded).name
    return here if here.exists() else Path(recorded)


def _why_best_is_not_whole(folder: Path) -> str | None:
    state = json.loads((folder / STATE).read_bytes())
    if not isinstance(state, dict):
        return f"its {STATE} holds no state"
    recorded = state.get("best_model_checkpoint")
    if recorded is None or Path(recorded).name == folder.name:
        return None
    best = checkpoint_beside(folder.parent, recorded)
    reason = why_not_whole(best, MODEL)
    return reason and f"{best}, the best until then, which is loaded at the end, is not whole either: {reason}"
