"""What users point at as a model, where it is none: which place was meant, before any library reads it."""

import os
import shlex
from pathlib import Path

from transformers.utils import CONFIG_NAME

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.files import nearest_place

PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".tar")
ADAPTER = "adapter_config.json"  # of PEFT
MOST_NAMED = 3


def refuse_other_place(path: str, what: str) -> None:
    """Refuse a path that is a file, a folder without a model, or nothing at all and no Hub id.

    Args:
        path: a folder, a Hub id, or whatever was given for one.
        what: the model, as the errors call it.

    Raises:
        DetectorLoadError: the message names the folder that was meant, or the command that makes one.
    """
    place = Path(path)
    if os.path.isfile(place):  # false, not an error, of a name that no file can have
        raise DetectorLoadError(f"{what} is a file: {_meant_by_file(place)}")
    if not os.path.exists(place) and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise DetectorLoadError(
            f"{what}: there is no such folder, and it is no Hub id (owner/name){nearest_place(path)}"
        )
    if os.path.isdir(place) and not (place / CONFIG_NAME).exists():
        raise DetectorLoadError(f"{what}: the folder holds no {CONFIG_NAME}: {_meant_by_folder(place)}")


def _meant_by_file(file: Path) -> str:
    if file.suffix in PICKLES:
        return f"make a folder of it that can be named, by {_conversion(file)}"
    if (file.parent / CONFIG_NAME).is_file():
        return f"name the folder, {file.parent}"
    return f"name a folder that holds {CONFIG_NAME} and model.safetensors"


def _meant_by_folder(folder: Path) -> str:
    if (folder / ADAPTER).is_file():
        return "it is an adapter of PEFT; merge it into its model, save that, and name its folder"
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if inside:
        more = f" or {len(inside) - MOST_NAMED} more" if len(inside) > MOST_NAMED else ""
        return f"name one of those in it, {', '.join(map(str, inside[:MOST_NAMED]))}{more}"
    if pickles := sorted(path for path in folder.iterdir() if path.suffix in PICKLES and path.is_file()):
        return f"make one that can be named, by {_conversion(pickles[0])}"
    return f"name one that holds {CONFIG_NAME} and model.safetensors"


def _conversion(file: Path) -> str:
    """The command that makes a checkpoint of a pickle."""
    return f"d3etr convert {shlex.quote(str(file))} NEW_FOLDER"
