"""What is in a data set, and what is wrong with it, before anything is trained on it.

    d3etr data check data/shapes
    d3etr data check data/shapes --model facebook/detr-resnet-50
    d3etr data check --dataset_name rishitdagli/cppe-5 --dataset_val_split test

Prints a table of both splits and all that is suspicious, and draws some annotated images to annotations.png in
--output_dir. The exit code is 1 where training would refuse the data.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments, DetectionDataset
from d3etr_hf.data.data_arguments import load_annotated
from d3etr_hf.data.duplicates import check_files_named_twice
from d3etr_hf.data.image_checks import describe_faults, describe_notes
from d3etr_hf.data.image_headers import ImageHeader, read_headers
from d3etr_hf.data.image_sizes import set_image_size
from d3etr_hf.data.overview import overview_of, overview_table
from d3etr_hf.data.unlabeled import check_unlabeled_images, load_unlabeled
from d3etr_hf.errors import CommandLineError, DatasetError
from d3etr_hf.files import make_folder
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.models.loading import load_detector
from d3etr_hf.training.object_counts import REMEDY, describe_more_objects
from d3etr_hf.visualization.annotation_grid import draw_annotations

CHECK = "check"


@dataclass
class CheckArguments:
    """What else to look at, and where the picture goes."""

    model: str | None = option(None, "A detector, for sizes after its resize and its queries: a folder or Hub id.")
    pictured: int = option(8, "How many images of each split to draw, from all over it; 0 for none.")
    output_dir: str = option("runs/data_check", "Gets annotations.png.")

    def __post_init__(self):
        if self.pictured < 0:
            raise ValueError(f"pictured is {self.pictured}: it must be at least 0")


def main() -> None:
    """What `d3etr data check` runs."""
    action, *argv = sys.argv[1:] or ["--help"]
    if action in ("-h", "--help"):
        argv = ["--help"]
    elif action != CHECK:
        raise CommandLineError(f"there is no 'd3etr data {action}': d3etr data check FOLDER is what there is")
    arguments, data = parse_arguments((CheckArguments, DataArguments), argv, __doc__, first_argument="data_folder")
    if not check_data(data, **vars(arguments)):
        sys.exit(1)


def check_data(data: DataArguments, model: str | None = None, pictured: int = 8, output_dir: str = "") -> bool:
    """Prints what is in the data and what is wrong with them; whether training would take them.

    Raises:
        DetectorLoadError: the model cannot be read.
        WriteError: the folder for the picture cannot be made.
    """
    processor, queries = None, {}
    if model is not None:
        detector = load_detector(model)
        processor = image_processor_of(detector.config.model_type, model)
        set_image_size(processor, data.short_side, data.long_side, data.image_size)
        queries = {"the model's": detector.query_count}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            splits = load_annotated(data)
        except DatasetError as error:
            return _report([], [str(error)])
    told = _told(caught)
    print(overview_table([overview_of(split, processor) for split in splits], splits[0].class_names, processor))
    headers = [read_headers(split) for split in splits]
    refused = _refusals(splits, headers, told)
    told += describe_notes(splits, headers)
    _look_at_unlabeled(data, splits, told, refused)
    more = [each for split in splits for each in describe_more_objects(split, queries, evaluated=split is splits[1])]
    told += [f"{'; '.join(more)}. {REMEDY}"] if more else []
    examples, undecodable = _decodable(_spread(splits, headers, pictured))
    if undecodable:
        refused.append(
            f"{len(undecodable)} of the {len(examples) + len(undecodable)} images that were to be drawn cannot be "
            f"decoded, and are left out of the picture: {undecodable[0]}"
        )
    accepted = _report(told, refused)
    if examples:
        picture = make_folder(output_dir) / "annotations.png"
        draw_annotations(examples, picture)
        print(f"\n{picture}")
    return accepted


def _refusals(
    splits: Sequence[DetectionDataset], headers: Sequence[Sequence[ImageHeader]], told: list[str]
) -> list[str]:
    """What training would refuse; what else is found on the way is added to `told`."""
    refused = []
    for split in splits:
        try:
            told.append(check_files_named_twice(split))
        except DatasetError as error:
            refused.append(str(error))
    refused.append(describe_faults(splits, headers))
    return [message for message in refused if message]


def _look_at_unlabeled(
    data: DataArguments, splits: Sequence[DetectionDataset], told: list[str], refused: list[str]
) -> None:
    """Images without labels, where a folder of them is named: their number, and what is to be known of them."""
    if data.unlabeled_images is None:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train, val = splits
            unlabeled = load_unlabeled(data.unlabeled_images, train, data.allow_images_elsewhere)
            unlabeled = check_unlabeled_images(unlabeled, train, val)
            print(f"{unlabeled.name}: {len(unlabeled)} images")
        except DatasetError as error:
            refused.append(str(error))
    told += _told(caught)


def _told(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """What is to be known of the data; not what a library warns of."""
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _spread(
    splits: Sequence[DetectionDataset], headers: Sequence[Sequence[ImageHeader]], count: int
) -> list[tuple[DetectionDataset, int]]:
    """So many images of each split that can be read, at even distances."""
    examples: list[tuple[Any, int]] = []
    for split, found in zip(splits, headers, strict=True):
        sound = [index for index, header in enumerate(found) if header.fault is None]
        places = np.linspace(0, len(sound) - 1, min(count, len(sound))).round().astype(int).tolist()
        examples += [(split, sound[place]) for place in places]
    return examples


def _decodable(
    examples: Sequence[tuple[DetectionDataset, int]],
) -> tuple[list[tuple[DetectionDataset, int]], list[str]]:
    """Those images that can be drawn, and what is wrong with each of the others: a sound header tells little."""
    found, faults = [], []
    for split, index in examples:
        try:
            split.read_image(index)
        except DatasetError as error:
            faults.append(str(error))
        else:
            found.append((split, index))
    return found, faults


def _report(told: list[str], refused: list[str]) -> bool:
    for heading, messages in (("to be looked at", told), ("refused", refused)):
        for message in filter(None, messages):
            print(f"\n{heading}: {message}")
    if not any(told) and not refused:
        print("\nnothing is suspicious")
    return not refused
