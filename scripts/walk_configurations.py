"""Every field of every family's configuration with odd values: built and run, refused in one line, or otherwise.

    python scripts/walk_configurations.py                     # all of them: most of an hour
    python scripts/walk_configurations.py --every 50          # one value in 50: a minute
    python scripts/walk_configurations.py --family rt_detr    # one family

Each value is tried in a `model_config` and in the config.json of a checkpoint. What is accepted sees one image in
evaluation and one with boxes in training. Settings of image processors are walked, too, each on one image. Ends with
exit code 1 where anything ended otherwise, which is listed.
"""

import argparse
import dataclasses
import json
import logging
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, ResNetConfig
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are the tests'

from d3etr_hf.errors import ImageSizeError, UserError
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import load_image_processor, new_image_processor
from d3etr_hf.models.loading import FAMILIES, ModelArguments, build_model, load_detector
from d3etr_hf.outputs import GroupRequest
from tests.tiny import random_labels, targets_of, tiny_config

SECONDS, WAITED = 10, 60  # that one value may take: of the processor, and by the clock of a machine that others use
NAMES = ["circle", "rectangle", "triangle"]
ODD_NUMBERS = [-1, 0, 1, 3, 7, 10_000, 10**6, 2**70, 0.5, 7.5, 1e30, float("nan"), float("inf"), True]
ODD_VALUES = [*ODD_NUMBERS, None, "", "nonsense", {}, {"nonsense": 1}, [], [0], [-1], [1] * 5, ["nonsense"], [[1]]]
# what old checkpoints have beside the fields of today
OLD_FIELDS = ("backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone", "dtype", "torch_dtype")
# families whose image processors are walked, and settings that old ones have
PROCESSORS = ("conditional_detr", "rt_detr", "rf_detr")
OLD_SETTINGS = ("pad_size", "max_size", "feature_extractor_type", "processor_class", "auto_map", "backend")
ODD_SETTINGS = [
    *ODD_VALUES,
    "800",
    [0.5] * 3,
    {"height": 64, "width": 0},
    {"height": 10**6, "width": 10**6},
    {"shortest_edge": "64", "longest_edge": 64},
    {"longest_edge": 64},
]
# a second backbone for one family
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}


class TooLong(BaseException):
    """No `Exception`, and so not what a net of errors expects."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), help="only this one")
    parser.add_argument("--field", help="only this one")
    parser.add_argument("--every", type=int, default=1, help="one value in so many")
    chosen = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    families = [chosen.family] if chosen.family else list(FAMILIES)
    counts = walk(families, chosen.every, chosen.field)
    families.append("image processors")
    ends = sorted({end for _, end in counts})
    print(f"\n{'family':<20}" + "".join(f"{end:>12}" for end in ends))
    for family in families:
        print(f"{family:<20}" + "".join(f"{counts[family, end]:>12}" for end in ends))
    print(f"{'all':<20}" + "".join(f"{sum(counts[family, end] for family in families):>12}" for end in ends))
    sys.exit(any(end not in ("accepted", "refused") for end in ends))


def walk(families: list[str], every: int = 1, field: str | None = None) -> Counter[tuple[str, str]]:
    """How often the values of each family ended how; what is neither accepted nor refused is printed."""
    for expired in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(expired, too_long)
    counts: Counter[tuple[str, str]] = Counter()

    def tried(what: str, message: str, act: Callable[[], None]) -> None:
        end, reason = end_of(act)
        counts[what, end] += 1
        if end not in ("accepted", "refused"):
            print(f"{what} {message[:200]}: {end}: {reason}", flush=True)

    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            whole = saved(family, Path(folder))
            for number, (name, change) in enumerate(odd_fields(family, whole)):
                if number % every or field not in (None, name):
                    continue
                for source in (as_checkpoint, as_model_config):
                    make = partial(source, whole, change, Path(folder))
                    tried(family, f"{source.__name__} {name} {change}", lambda make=make: run(make()))
    for kind, (name, change) in enumerate(odd_settings()):
        if kind % every == 0 and field in (None, name):
            tried("image processors", f"{name} {change}", partial(make_pixels, change))
    return counts


def saved(family: str, folder: Path) -> dict[str, Any]:
    """The fields of a tiny checkpoint, which is written."""
    torch.manual_seed(0)
    FAMILIES[family](tiny_config(family)).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def odd_fields(family: str, whole: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names of fields, and what becomes of the configuration by an odd value of it: its backbone's fields, too."""
    changes = []
    for name in [*names_of(whole["model_type"]), *OLD_FIELDS]:
        if name != "backbone_config":
            changes += [(name, {name: value}) for value in odd_values(whole.get(name))]
    backbones = [whole["backbone_config"]]
    if family == "conditional_detr":
        backbones.append({**ResNetConfig(**RESNET).to_dict(), "model_type": "resnet", "out_features": ["stage2"]})
    for backbone in backbones:
        backbone = {name: value for name, value in backbone.items() if name != "stage_names"}
        changes += [("backbone_config", {"backbone_config": value}) for value in odd_values(None)]
        for name in [*names_of(backbone["model_type"]), "model_type", "out_features", "out_indices", "stage_names"]:
            odd = [{**backbone, name: value} for value in odd_values(backbone.get(name))]
            changes += [(f"backbone_config.{name}", {"backbone_config": value}) for value in odd]
    return changes


def odd_settings() -> list[tuple[str, dict[str, Any]]]:
    """Names of settings, and what becomes of an image processor's by an odd value of it."""
    changes = []
    for kind in PROCESSORS:
        whole = json.loads(new_image_processor(kind).to_json_string())
        changes += [(name, {**whole, name: value}) for name in [*whole, *OLD_SETTINGS] for value in ODD_SETTINGS]
    return changes


def make_pixels(settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / IMAGE_PROCESSOR_NAME).write_text(json.dumps(settings))
        load_image_processor(folder)(torch.ones(3, 8, 8, dtype=torch.uint8).numpy(), return_tensors="pt")


def names_of(model_type: str) -> list[str]:
    """The fields of a configuration class."""
    return [field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])]


def odd_values(value: Any) -> list[Any]:
    """Values for a field that has this one: the odd ones, and neighbours of its own."""
    if isinstance(value, list):
        return [*ODD_VALUES, value[:-1], [*value, *value[-1:]], value[::-1], [10**6] * len(value), [None] * len(value)]
    if isinstance(value, int) and not isinstance(value, bool):
        return [*ODD_VALUES, value + 1, value - 1, 2 * value, str(value), [value]]
    return ODD_VALUES


def as_checkpoint(whole: dict[str, Any], change: dict[str, Any], folder: Path) -> Detector:
    (folder / "config.json").write_text(json.dumps(whole | change))
    return load_detector(str(folder))


def as_model_config(whole: dict[str, Any], change: dict[str, Any], folder: Path) -> Detector:
    own = set(CONFIG_MAPPING[whole["model_type"]]().to_dict()) - {"id2label", "label2id", "architectures", "dtype"}
    options = {name: value for name, value in whole.items() if name in own} | change
    backbone = options["backbone_config"]
    if isinstance(backbone, dict):
        options["backbone_config"] = {name: value for name, value in backbone.items() if name != "architectures"}
    return build_model(ModelArguments(model_config=options), NAMES)


def end_of(act: Callable[[], None]) -> tuple[str, str]:
    """How it ended, and by which message."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITED)
    try:
        act()
    except UserError as error:
        message = str(error)
        return ("refused" if "\n" not in message and len(message) < 1500 else "unclear"), message
    except TooLong:
        return "too long", traceback.format_exc().splitlines()[-4].strip()
    except Exception as error:  # the very fault that is looked for
        return (
            "traceback",
            f"{type(error).__name__}: {str(error)[:200]} {traceback.format_exc().splitlines()[-3].strip()}",
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted", ""


def run(model: Detector) -> None:
    """One image in evaluation, and one with boxes in training."""
    side = -(-96 // int(model.side_divisor)) * int(model.side_divisor)
    pixels = torch.rand(1, 3, side, side)
    targets = targets_of(random_labels([2]))
    for mode, request in ((False, GroupRequest()), (True, GroupRequest(targets=targets))):
        try:
            model.check_image(side, side)
            model.train(mode)(pixels, request=request)
        except ImageSizeError:
            return  # of a model for larger images


def too_long(*_: object) -> None:
    """Ends a value that takes too long."""
    raise TooLong


if __name__ == "__main__":
    main()
