"""Every training option with odd values: how many end in success, in one line that names the option, or otherwise.

    python scripts/walk_options.py            # builds the options alone: seconds
    python scripts/walk_options.py --steps    # and trains one step of a tiny model with each that is accepted: minutes

Ends with exit code 1 where anything ended otherwise, which is listed.
"""

import argparse
import dataclasses
import enum
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are the tests'

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import UserError
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

ODD_NUMBERS = [-1, 0, 0.5, 3, 2**70, float("nan"), float("inf"), True]
ODD_VALUES = [*ODD_NUMBERS, "", "nonsense", "{nonsense", {}, {"nonsense": 1}, [], ["nonsense"], None]
# what is no option of a run, but where it is
ASIDE = ("output_dir",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="train one step with every value that is accepted")
    parser.add_argument("--option", help="only this one")
    chosen = parser.parse_args()
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        shapes = make_shapes(Path(folder) / "shapes", 8, 3, image_size=64, progress=False) if chosen.steps else None
        for name, value in odd_options():
            if chosen.option not in (None, name):
                continue
            end, message = end_of(name, value, Path(folder), shapes)
            ends[end] += 1
            if end == "otherwise":
                print(f"{name}={value!r}: {message}", flush=True)
    print(f"\n{len({name for name, _ in odd_options()})} options, {sum(ends.values())} values")
    for end, count in ends.most_common():
        print(f"{count:6} {end}")
    sys.exit(1 if ends["otherwise"] else 0)


def odd_options() -> list[tuple[str, Any]]:
    """Names and values: the odd ones, and every choice where a field has some."""
    hints = get_type_hints(D3etrTrainingArguments)
    options = []
    for field in dataclasses.fields(D3etrTrainingArguments):
        if field.init and field.name not in ASIDE:
            options += [(field.name, value) for value in ODD_VALUES + choices_of(hints[field.name])]
    return options


def choices_of(hint: Any) -> list[Any]:
    """The members of enumerations and literals in a type hint."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [member.value for member in hint]
    if not isinstance(hint, type) and get_args(hint):
        return [choice for part in get_args(hint) for choice in choices_of(part)]
    return [hint] if isinstance(hint, str) else []


def end_of(name: str, value: Any, folder: Path, shapes: Path | None) -> tuple[str, str]:
    """How a value of an option ended, and by which message."""
    try:
        D3etrTrainingArguments(**({"output_dir": str(folder / "run"), "use_cpu": True} | {name: value}))
    except (UserError, ValueError) as error:
        return ("refused" if is_clear(str(error), name) else "otherwise"), str(error)
    except Exception as error:  # the very fault that is looked for
        return "otherwise", f"{type(error).__name__}: {error}"
    return ("accepted", "") if shapes is None else end_of_a_step(name, value, folder, shapes)


def end_of_a_step(name: str, value: Any, folder: Path, shapes: Path) -> tuple[str, str]:
    """How one training step ended."""
    from tests.shapes_fixture import shapes_trainer

    options = {"max_steps": 1} | ({"max_steps": -1, "num_train_epochs": 1} if name == "num_train_epochs" else {})
    try:
        shapes_trainer(shapes, folder / "run", **(options | {name: value})).train()
    except UserError as error:
        return ("stopped by a clear error" if is_clear(str(error)) else "otherwise"), str(error)
    except Exception as error:  # the very fault that is looked for
        return "otherwise", f"{type(error).__name__}: {error} {traceback.format_exc().splitlines()[-3].strip()}"
    return "trained", ""


def is_clear(message: str, name: str = "") -> bool:
    """Whether a message is one line that names the option."""
    return "\n" not in message and re.search(rf"\b{name}\b", message) is not None


if __name__ == "__main__":
    main()
