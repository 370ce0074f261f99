"""What a checkpoint's preprocessor_config.json says, checked before an image processor is made of it."""

import math
from typing import Any

from PIL import Image

from d3etr_hf.errors import DetectorLoadError, quoted

MOST_PIXELS = 4096  # of a side; of the longest, which only bounds an image, so many times as many
LONGEST = 4
SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
SIZES = ("size", "pad_size")
COLORS = ("image_mean", "image_std")
CHANNELS = 3


def check_settings(settings: Any, what: str) -> None:
    """Refuse what would fail at the first image, exhaust the memory, or make pixels that are no numbers.

    Args:
        settings: what the file holds.
        what: the file, as the errors call it.

    Raises:
        DetectorLoadError: the message names the setting and its value.
    """
    if not isinstance(settings, dict):
        raise DetectorLoadError(f"{what} must hold settings by name, and holds {quoted(settings)}")
    for name, value in settings.items():
        if wrong := _what_is_wrong(name, value):
            raise DetectorLoadError(f"{what}: {name} is {quoted(value)}, and {wrong}")


def _what_is_wrong(name: str, value: Any) -> str | None:
    """What a setting must be, where it is not; None where nothing is known of it."""
    if name == "backend":
        return "is no setting: leave it out"  # Transformers derives it, and could not set it
    if value is None:
        return None
    if name.startswith("do_"):
        return None if isinstance(value, bool) else "must be true or false"
    if name in SIZES:
        listed = enumerate(value if isinstance(value, list) else [value])
        sides = list(value.items() if isinstance(value, dict) else listed)
        right = bool(sides) and (not isinstance(value, dict) or set(value) <= set(SIDES))
        for kind, side in sides:
            most = MOST_PIXELS * (LONGEST if kind == "longest_edge" else 1)
            right = right and (side is None or _is_whole(side, 1, most))
        return None if right else f"must name sides ({', '.join(SIDES)}) of 1 to {MOST_PIXELS:,} pixels"
    if name == "resample":
        return None if _is_whole(value, 0, max(Image.Resampling)) else "must be one of Pillow's filters, 0 to 5"
    if name == "rescale_factor":
        return None if _is_number(value) and value > 0 else "must be a number above 0"
    if name in COLORS:
        numbers = value if isinstance(value, list) else [value] * CHANNELS
        right = len(numbers) == CHANNELS and all(_is_number(number) for number in numbers)
        right = right and (name == COLORS[0] or min(numbers) > 0)
        return None if right else f"must hold {CHANNELS} numbers{'' if name == COLORS[0] else ' above 0'}"
    return None


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
