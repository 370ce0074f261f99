"""A stock checkpoint from what the authors of Conditional DETR or DETR published, or from a pickle of Transformers.

    d3etr convert ConditionalDETR_r50dc5_epoch50.pth detectors/conditional_dc5
    d3etr convert checkpoint.pth detectors/mine --classes names.txt
    d3etr convert old/pytorch_model.bin detectors/mine  # with its config.json beside it, which names the classes

The file is a pickle: tensors, plain values and the authors' argparse.Namespace are read, and no code of it is run.
Writes config.json, model.safetensors and the image processor's settings; what comes out is a teacher or a model to go
on from. A dilated backbone (DC5) teaches and is evaluated, and cannot be trained.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.errors import CommandLineError, DetectorLoadError, OutputFolderError
from d3etr_hf.files import UNFINISHED, write_errors
from d3etr_hf.models.coco_classes import COCO_CLASSES
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector
from d3etr_hf.models.official_names import convert_official
from d3etr_hf.models.pickled_weights import convert_stock_pickle, is_of_authors, read_pickle


@dataclass
class ConvertArguments:
    """Which file, and what becomes of it."""

    checkpoint: str = field(
        metadata={"help": "The authors' file, or pytorch_model.bin; also taken as first argument."}
    )
    output: str = field(metadata={"help": "A new folder for the checkpoint; also taken as second argument."})
    classes: str = option("coco", "coco (its 91 ids), or a text file with a class name a line.")
    dilated: bool | None = option(
        None, "Whether the backbone is dilated (DC5), for a file that holds no options of its training."
    )


def main() -> None:
    """What `d3etr convert` runs."""
    argv = sys.argv[1:]
    if len(argv) > 1 and not argv[0].startswith("-") and not argv[1].startswith("-"):
        argv.insert(1, "--output")
    (arguments,) = parse_arguments([ConvertArguments], argv, __doc__, first_argument="checkpoint")
    print(convert_checkpoint(**vars(arguments)))


def convert_checkpoint(checkpoint: str, output: str, classes: str = "coco", dilated: bool | None = None) -> str:
    """Convert a published checkpoint, and load what was written; what cannot be loaded leaves nothing behind.

    What the file holds decides whose it is, and not its name or what lies beside it.

    Args:
        checkpoint: the authors' `.pth` file, or a pickle beside the `config.json` that Transformers saved with it.
        output: a folder that is new or empty.
        classes: "coco", or a text file with a class name a line.
        dilated: whether the backbone is dilated; None: as the file says.

    Returns:
        What it has become, in words.

    Raises:
        DetectorLoadError, OutputFolderError, CommandLineError, WriteError: the message says what to do.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputFolderError(f"{output} is not empty: give a new folder")
    content = read_pickle(checkpoint)
    with write_errors(folder):
        place = folder.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{place.name}{UNFINISHED}", dir=place.parent) as beside:
            unfinished = Path(beside) / place.name
            if is_of_authors(content):
                config = convert_official(checkpoint, content, unfinished, _class_names(classes), dilated)
                load_image_processor(None, model_type=config.model_type).save_pretrained(unfinished)
            else:
                convert_stock_pickle(checkpoint, content, unfinished)
            said = _loaded(checkpoint, unfinished, output)
            if place.exists():
                place.rmdir()  # which is empty: not every system lets a folder take its place
            unfinished.rename(place)
    return said


def _loaded(checkpoint: str, unfinished: Path, output: str) -> str:
    """What was written, in words, by its last name."""
    try:
        detector = load_detector(str(unfinished))
    except DetectorLoadError as error:
        reason = str(error).replace(str(unfinished), output)
        raise DetectorLoadError(f"{checkpoint} became no detector: {reason}") from error
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    note = "" if detector.unsaveable is None else f"; {detector.unsaveable}"
    return f"{output}: {detector.title}, {parameters:,} parameters, {len(detector.class_names)} classes{note}"


def _class_names(classes: str) -> list[str]:
    if classes == "coco":
        return COCO_CLASSES
    try:
        names = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandLineError(f"--classes {classes!r} cannot be read ({error}): coco, or a file of names") from error
    return names
