"""Detections on images of your own: a picture of each, and one JSON file.

    d3etr predict runs/demo/distilled photos
    d3etr predict user/student photos one.jpg 'more/**/*.png' --out found --threshold 0.3

Takes any detector that Transformers loads, of a folder or of the Hub; images are files, folders (without their
subfolders) and patterns. They are turned upright as their EXIF data say. Writes predictions.json into --out, a list
with an entry an image: file, width, height, picture, and detections with label, score and box (left, top, right and
bottom in pixels), and beside it the pictures. If an image cannot be read, all that was found before it is written.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.data.image_lists import find_images
from d3etr_hf.errors import CommandLineError, OutputFolderError
from d3etr_hf.evaluation.image_detections import Predictor, readable, record_of
from d3etr_hf.files import make_folder, write_errors, write_json
from d3etr_hf.visualization.detected_image import draw_detected_image

PREDICTIONS = "predictions.json"


@dataclass
class PredictionArguments:
    """Which detector on which images, and where the result goes."""

    model: str = field(metadata={"help": "The detector: a folder or Hub id; also taken as first argument."})
    images: list[str] = field(
        metadata={"help": "Files, folders and patterns; also taken as arguments after the first."}
    )
    out: str = option("runs/predictions", "Gets predictions.json and the pictures.")
    threshold: float = option(0.5, "Detections with a lower score are left out.")
    batch_size: int = option(
        1, "Images at a time; more than one are padded to one size, which changes predictions a little."
    )
    pictures: bool = option(True, "Draw a picture of every image.")
    skip_broken_images: bool = option(
        False, "Leave out what is no readable image, with one warning, instead of refusing it."
    )
    use_cpu: bool = option(False, "Do not use a GPU.")

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: it must be in 0..1")


def main() -> None:
    """What `d3etr predict` runs."""
    argv = with_names(sys.argv[1:])
    (arguments,) = parse_arguments([PredictionArguments], argv, __doc__, first_argument="model")
    predict_into(arguments)


def with_names(argv: Sequence[str]) -> list[str]:
    """The arguments with `--model` and `--images` before those that come first, without names.

    Raises:
        CommandLineError: a model without images, or images named in both ways.
    """
    count = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    positional, named = list(argv[:count]), list(argv[count:])
    if not positional:
        return named
    model, *images = positional
    by_name = any(word.split("=")[0] == "--images" for word in named)
    if images and by_name:
        raise CommandLineError(f"images are {images} and --images: give all of them in one of the two places")
    if not images and not by_name:
        raise CommandLineError(f"which images? d3etr predict {model} IMAGES ... (files, folders or patterns)")
    return ["--model", model, *(["--images", *images] if images else []), *named]


def predict_into(arguments: PredictionArguments) -> None:
    """Detect, and write pictures and predictions into the folder that is asked for.

    Raises:
        DatasetError, DetectorLoadError, NonFiniteLossError: as `predict` and `Predictor`; what came before is written.
        OutputFolderError, WriteError: the folder holds the images themselves, or cannot be written.
    """
    files = readable(find_images(arguments.images), arguments.skip_broken_images)
    out = Path(arguments.out)
    if arguments.pictures and out.resolve() in {path.resolve().parent for path in files}:
        raise OutputFolderError(f"--out {out} holds the images themselves: give another folder, or --pictures false")
    predictor = Predictor(arguments.model, arguments.batch_size, arguments.use_cpu)
    make_folder(out)
    records, names = [], dict(zip(files, picture_names(files), strict=True))
    try:
        for path, image, detections in predictor(files, arguments.skip_broken_images):
            record = record_of(path, image, detections, predictor.class_names, arguments.threshold)
            if arguments.pictures:
                with write_errors(out / names[path]):
                    draw_detected_image(
                        image, detections, predictor.class_names, out / names[path], arguments.threshold
                    )
                record["picture"] = names[path]
            records.append(record)
    finally:
        write_json(out / PREDICTIONS, records)
    found = sum(len(record["detections"]) for record in records)
    print(f"{out / PREDICTIONS}: {found} detections on {len(records)} images, scores above {arguments.threshold:g}")


def picture_names(files: Sequence[Path]) -> list[str]:
    """A PNG's name for each image: its own, with a number where two folders have the same."""
    taken: set[str] = set()
    names = []
    for path in files:
        name, number = path.stem, 1
        while name.casefold() in taken:  # some file systems tell no case apart
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names
