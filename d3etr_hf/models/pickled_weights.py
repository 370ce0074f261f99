"""The one place that opens a pickle, for `d3etr convert`; elsewhere weights are read from safetensors alone.

By PyTorch's restricted reader, with `argparse.Namespace` and nothing else let in.
"""

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME

from d3etr_hf.errors import DetectorLoadError


def read_pickle(path: str) -> Any:
    """What a file of PyTorch's holds: tensors, plain values and options.

    Raises:
        DetectorLoadError: it cannot be read, or holds anything else.
    """
    if not Path(path).is_file():
        raise DetectorLoadError(f"{path}: there is no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may fail in any way
        # not PyTorch's own message, which advises to read it unsafely
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is damaged, or of another kind"
        raise DetectorLoadError(
            f"{path} is no PyTorch file that can be read safely: {reason}, and nothing but tensors, plain values and "
            "argparse.Namespace is let in; download it again from its authors"
        ) from error


def are_tensors(content: Any) -> bool:
    """Whether these are tensors by name."""
    return isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())


def is_of_authors(content: Any) -> bool:
    """Whether a pickle is laid out as the authors' code saves it: with tensors by name under "model"."""
    tensors = content.get("model") if isinstance(content, dict) else None
    return bool(tensors) and are_tensors(tensors)


def convert_stock_pickle(path: str, tensors: Any, folder: Path) -> None:
    """Write the folder again in which Transformers saved a pickle, with `model.safetensors` in its place.

    Args:
        path: the pickle, beside its `config.json`.
        tensors: what it holds.
        folder: where to write; it is made.

    Raises:
        DetectorLoadError: it holds not a model's tensors, or there is no configuration beside it.
    """
    if "-of-" in Path(path).name:
        raise DetectorLoadError(f"{path} is one of several parts of a checkpoint: save it in one, or as safetensors")
    if not are_tensors(tensors) or not tensors:
        raise DetectorLoadError(
            f"{path} holds no tensors by name, neither as Transformers' pytorch_model.bin does nor under 'model', as "
            "the authors' checkpoints do"
        )
    if not Path(path).with_name(CONFIG_NAME).is_file():
        raise DetectorLoadError(
            f"{path} holds tensors as Transformers' pytorch_model.bin does: put the {CONFIG_NAME} that was saved with "
            "it beside it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # tied tensors are one in a pickle, and may be none in safetensors
    own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(own, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
    for name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME):
        if Path(path).with_name(name).is_file():
            shutil.copyfile(Path(path).with_name(name), folder / name)
