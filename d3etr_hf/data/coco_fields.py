"""The types of everything that is read of a COCO detection dictionary, in one place and before it is used."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d3etr_hf.errors import DatasetError, quoted

TOP_LEVEL_KEYS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Rule:
    """What a field may hold: a function that says so of a value, and the same in words, after "it must be"."""

    admits: Callable[[Any], bool]
    meaning: str


def is_integer(value: Any) -> bool:
    """An integer of 64 bits; true and false are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_finite(value: Any) -> bool:
    """A number that is finite as a float; text, true and false are no numbers."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_text(value: Any) -> bool:
    """Text that can be written down: without NUL, and without halves of surrogate pairs."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_box(value: Any) -> bool:
    """A list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_finite, value))


INTEGER = Rule(is_integer, "an integer of at most 64 bits")
SIDE = Rule(lambda value: is_integer(value) and value > 0, "an integer of at least 1, in pixels")
NAME = Rule(lambda value: is_text(value) and value.strip() != "", "text, without NUL or lone surrogates")
FILE_NAME = Rule(lambda value: is_text(value) and value != "", "the name of a file")
BOX = Rule(is_box, "four finite numbers, x, y, width, height in pixels")
AREA = Rule(
    lambda value: value is None or (is_finite(value) and value >= 0),
    "a finite number of at least 0, in pixels, or null or left out for the area of the box",
)
CROWD = Rule(lambda value: value is None or type(value) in (int, bool) and value in (0, 1), "0 or 1")

RULES = {
    "categories": {"id": INTEGER, "name": NAME},
    "images": {"id": INTEGER, "width": SIDE, "height": SIDE},
    "annotations": {
        "id": INTEGER,
        "image_id": INTEGER,
        "category_id": INTEGER,
        "bbox": BOX,
        "area": AREA,
        "iscrowd": CROWD,
    },
}


def check_fields(coco: Any, source: str, file_names: bool = False) -> None:
    """Checks every field that training or evaluation reads; what they do not read is not looked at.

    Args:
        coco: as in a COCO detection JSON.
        source: what an error message calls the dictionary, for example its path.
        file_names: whether its images must have a `file_name`.

    Raises:
        DatasetError: a part is missing, or a field is missing or of the wrong type; the message names the first such
            field and counts the others.
    """
    if not isinstance(coco, dict):
        raise DatasetError(f"{source}: holds a {type(coco).__name__} at its top level, not the object of a COCO file.")
    for part in TOP_LEVEL_KEYS:
        if not isinstance(coco.get(part), list):
            found = "is missing" if part not in coco else f"is a {type(coco[part]).__name__}"
            raise DatasetError(
                f"{source}: the list `{part}` {found}: a COCO detection file has {', '.join(TOP_LEVEL_KEYS)} "
                "at its top level."
            )
    first, count = "", 0
    for part, rules in RULES.items():
        if part == "images" and file_names:
            rules = {**rules, "file_name": FILE_NAME}
        for index, entry in enumerate(coco[part]):
            for fault in _faults(entry, rules):
                first = first or f"{part}[{index}]{fault}"
                count += 1
    if count:
        others = f" ({count - 1} more such faults follow)" if count > 1 else ""
        raise DatasetError(f"{source}: {first}{others}.")


def _faults(entry: Any, rules: dict[str, Rule]) -> list[str]:
    if not isinstance(entry, dict):
        return [f" is a {type(entry).__name__}, not an object"]
    wrong = [field for field, rule in rules.items() if not rule.admits(entry.get(field))]
    if not wrong:
        return []
    name = ", ".join(f"{key} {quoted(entry.get(key))}" for key in ("id", "image_id") if key in rules)
    return [
        f" ({name}) has `{field}` {quoted(entry.get(field))}: it must be {rules[field].meaning}" for field in wrong
    ]


def without_nulls(coco: dict) -> dict:
    """The same dictionary whose annotations lack an `area` and an `iscrowd` that are null: null means left out."""
    nullable = ("area", "iscrowd")
    annotations = [
        {key: value for key, value in annotation.items() if value is not None or key not in nullable}
        if any(key in annotation and annotation[key] is None for key in nullable)
        else annotation
        for annotation in coco["annotations"]
    ]
    return {**coco, "annotations": annotations}
