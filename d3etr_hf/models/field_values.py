"""The values of a configuration's fields, held against what its class in Transformers has by default.

Before a configuration is made of them, since some make lists as long as a number in them says. Types are Transformers'
own to check, and what fits together only building shows (`trial`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from d3etr_hf.errors import DetectorLoadError, quoted

# a whole number may be so many times the class's own, or this where that is less
MOST_TIMES, MOST_SMALL = 32, 256
# of a field that has no number by default
MOST_NUMBER = 10**6
MOST_ENTRIES, MOST_DEPTH = 1000, 8
SHARE = re.compile(r"drop(out|_path|_rate)|layerdrop|_prob$")
# where nothing is a choice: no loss of a kind, no denoising, no encoder, the first of several
ZERO_IS_A_CHOICE = re.compile(
    r"cost|coefficient|weight|denoising|^encoder_layers$|indices|indexes|_proj_layers|register"
)
ACTIVATION = re.compile(r"activation(_function)?$|hidden_act$|^act$")
# checked by themselves: as many entries as there are classes
CLASSES = ("id2label", "label2id")


def check_field_values(fields: dict[str, Any], config_class: type[PreTrainedConfig], place: str) -> None:
    """Refuse numbers that no model has, and activations that do not exist.

    Args:
        fields: what was written, by the field's name, other configurations within it.
        config_class: the class of the configuration.
        place: where it was written, as the errors call it.

    Raises:
        DetectorLoadError: the message names the field and its value.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    aliases: dict[str, str] = config_class.attribute_map
    for name, value in fields.items():
        if name in CLASSES:
            continue
        if callable(getattr(config_class, str(name), None)):
            raise DetectorLoadError(f"{place}: {name} is no field: leave it out")
        if isinstance(value, dict) and value.get("model_type") in _names(CONFIG_MAPPING):
            check_field_values(value, CONFIG_MAPPING[value["model_type"]], f"{place}: {name}")
            continue
        default = defaults.get(aliases.get(name, name))
        if isinstance(default, str) and ACTIVATION.search(name) and value not in _names(ACT2FN):
            raise DetectorLoadError(
                f"{place}: {name} is {quoted(value)}, which is no activation; there are {', '.join(sorted(ACT2FN))}"
            )
        if name in ("dtype", "torch_dtype") and not _is_precision(value):
            raise DetectorLoadError(
                f"{place}: {name} is {quoted(value)}, which is no precision of weights: float32, float16 or bfloat16"
            )
        for single in _flat(value, f"{place}: {name}"):
            if wrong := _what_is_wrong(name, single, default):
                raise DetectorLoadError(f"{place}: {name} is {quoted(value)}: {wrong}")


def _is_precision(value: Any) -> bool:
    """Whether it names floating-point numbers of PyTorch, or none."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return value is None or (isinstance(found, torch.dtype) and found.is_floating_point)


def _names(known: Any) -> list[str]:
    """Names to look among for what may be of any type, hashable or not."""
    return list(known)


def _flat(value: Any, place: str, depth: int = 0) -> Iterator[Any]:
    """What lists and mappings hold in the end."""
    if not isinstance(value, (list, tuple, dict)):
        yield value
        return
    if len(value) > MOST_ENTRIES or depth > MOST_DEPTH:
        raise DetectorLoadError(
            f"{place} has {len(value)} entries, {depth} deep: at most {MOST_ENTRIES:,} and {MOST_DEPTH} deep are read"
        )
    for entry in value.values() if isinstance(value, dict) else value:
        yield from _flat(entry, place, depth + 1)


def _what_is_wrong(name: str, value: Any, default: Any) -> str | None:
    """What a number of a field must be, where it is not; None of what is none."""
    known = [default] if isinstance(default, (int, float)) else default if isinstance(default, (list, tuple)) else []
    numbers = [number for number in known if isinstance(number, (int, float)) and not isinstance(number, bool)]
    if isinstance(value, bool):
        return "must be a number" if numbers and len(numbers) == len(known) else None
    if not isinstance(value, (int, float)):
        return None
    whole = [number for number in numbers if isinstance(number, int)]
    most = max(MOST_SMALL, MOST_TIMES * max(whole)) if whole and len(whole) == len(numbers) else MOST_NUMBER
    if not (isinstance(value, int) or math.isfinite(value)):
        return "must be finite"
    if (numbers or default is None) and SHARE.search(name) and not 0 <= value <= 1:
        return "must be from 0 to 1"
    if not -most <= value <= most:
        return f"must be at most {most:,}, which is more than any detector has"
    if numbers and value < 0 <= min(numbers):
        return "must not be negative"
    if whole and value == 0 < min(whole) and not ZERO_IS_A_CHOICE.search(name):
        return "must be 1 or more"
    return None
