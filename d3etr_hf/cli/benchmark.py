"""What detectors cost at inference: parameters, floating-point operations by part, and milliseconds an image.

    d3etr benchmark runs/demo/teacher runs/demo/distilled
    d3etr benchmark runs/bccd/distilled user/student --height 800 --width 1066
    d3etr benchmark configs/coco/r50_model.yaml configs/coco/r18_model.yaml    # before there are weights

One image at a time, or several (--batch_size), as each detector's own image processor scales it, or that of its
family's authors where there is a configuration alone; the detectors take turns, so that a busy machine hits all alike.
A multiplication and an addition count as two operations.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.utils import CONFIG_NAME

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.errors import ImageSizeError, one_line
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.models.loading import load_detector
from d3etr_hf.models.new_models import new_model, read_model_config
from d3etr_hf.publishing.inference_cost import count_cost, measure_milliseconds

CONFIGURATIONS = (".yaml", ".yml", ".json")
CLASSES = 80  # of a detector that has no weights yet


@dataclass
class CostArguments:
    """Which detectors, and on images of which size."""

    models: list[str] = field(
        metadata={
            "help": "The detectors: folders, Hub ids or model configurations (.yaml, .json); also taken as first "
            "arguments."
        }
    )
    height: int = option(480, "Height of the image in pixels, before the detector's image processor scales it.")
    width: int = option(640, "Width of the image in pixels, before the detector's image processor scales it.")
    batch_size: int = option(1, "Images at once; the milliseconds are of one of them.")
    use_cpu: bool = option(False, "Do not use a GPU.")

    def __post_init__(self):
        for name in ("height", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


def main() -> None:
    """What `d3etr benchmark` runs."""
    (arguments,) = parse_arguments([CostArguments], description=__doc__, first_argument="models")
    print(format_costs(measure_costs(**vars(arguments))))


def measure_costs(
    models: list[str], height: int = 480, width: int = 640, batch_size: int = 1, use_cpu: bool = False
) -> dict[str, dict]:
    """Cost of a forward pass for one image, by detector.

    Args:
        models: folders, Hub ids or files with a model's configuration.
        height, width: of the image in pixels, before a detector's image processor scales it.
        batch_size: how many images are timed at once.
        use_cpu: leave a GPU alone.

    Returns:
        Model → what `count_cost` returns, and `milliseconds` as from `measure_milliseconds`.

    Raises:
        DetectorLoadError: a model cannot be loaded or built.
    """
    return costs_of({path: detector_of(path) for path in models}, height, width, batch_size, use_cpu)


def detector_of(path: str) -> Detector:
    """The detector of a checkpoint; of a configuration a new one of `CLASSES` classes: random weights cost as much.

    Raises:
        DetectorLoadError: it cannot be loaded or built.
    """
    if not is_configuration(path):
        return load_detector(path)
    return new_model(read_model_config(path), [f"class {number}" for number in range(CLASSES)], path)


def is_configuration(path: str) -> bool:
    """Whether what is to be measured is a file with a model's configuration, by its name.

    No folder, whatever it is called, and not the file in a checkpoint's: who names that is told to name the folder.
    """
    return path.endswith(CONFIGURATIONS) and Path(path).name != CONFIG_NAME and not os.path.isdir(path)


def costs_of(
    detectors: dict[str, Detector], height: int, width: int, batch_size: int = 1, use_cpu: bool = False
) -> dict[str, dict]:
    """As `measure_costs`, of detectors by what they were made of; they end in eval mode where they ran.

    Raises:
        ImageSizeError: the image is so narrow that it cannot be resized.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not use_cpu else "cpu"
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    costs: dict[str, dict] = {}
    timed: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {}
    for path, detector in detectors.items():
        torch.nn.Module.to(detector.eval(), device)
        processor = image_processor_of(detector.config.model_type, None if is_configuration(path) else path)
        try:
            pixel_values = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"].to(device)
        except ValueError as error:  # of a side that would be no pixel long
            raise ImageSizeError(
                f"{path}: an image of {width}×{height} pixels cannot be resized ({one_line(error)}): choose another "
                "height or width"
            ) from error
        costs[path] = count_cost(detector, pixel_values)
        timed[path] = (detector.to_stock(), pixel_values.repeat(batch_size, 1, 1, 1))
    for path, milliseconds in measure_milliseconds(timed).items():
        costs[path]["milliseconds"] = milliseconds
    return costs


def format_costs(costs: dict[str, dict]) -> str:
    """A table for a terminal: a line a model, and one for each of its parts."""
    wide = max(len("  heads and projections"), *map(len, costs)) + 2
    lines = [f"{'model':<{wide}}{'pixels':>11}{'parameters':>14}{'GFLOP':>10}{'ms an image':>26}"]
    for name, cost in costs.items():
        size, ms = f"{cost['height']}x{cost['width']}", cost["milliseconds"]
        time = f"{ms['median']:.1f} ({ms['low']:.1f}-{ms['high']:.1f})"
        lines.append(f"{name:<{wide}}{size:>11}{cost['parameters']:>14,}{cost['flops'] / 1e9:>10.3f}{time:>26}")
        for part, value in cost["parts"].items():
            lines.append(f"{'  ' + part:<{wide}}{'':>11}{value['parameters']:>14,}{value['flops'] / 1e9:>10.3f}")
    return "\n".join(lines)
