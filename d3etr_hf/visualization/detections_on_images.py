"""Detections on the images of a folder or a data set, ready to be drawn side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.data.images import read_upright
from d3etr_hf.errors import DatasetError, PictureError
from d3etr_hf.evaluation import predict_detections
from d3etr_hf.evaluation.image_detections import ImagesForModel
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.visualization.detection_grid import draw_detection_grid

logger = logging.get_logger(__name__)

ROWS_A_PAGE = 8
LONGEST_TITLE = 30  # characters that fit over a column


@dataclass(frozen=True)
class ChosenImages:
    """What is to be drawn: RGB images and their names; what only a data set has is None and empty for a folder.

    Attributes:
        ground_truth: per image (boxes, 6): x, y, width, height in pixels, 1, label.
        class_names: the name of each label of the ground truth.
    """

    names: list[str]
    images: list[Image.Image]
    ground_truth: list[Tensor] | None
    class_names: list[str]


def choose_images(folder: str | None, data: DataArguments, split: str = "val", first: int = 6) -> ChosenImages:
    """The first images of a folder, or of a split ("train" or "val") of the data set that `data` names.

    Raises:
        PictureError: both are named, or neither.
        DatasetError: they cannot be read.
    """
    has_data = any((data.data_folder, data.dataset_name, data.train_annotations))
    if has_data == (folder is not None):
        both = "not both" if has_data else "neither is there"
        raise PictureError(f"give a folder of 'images' or a data set (data_folder, dataset_name, or paths): {both}")
    if folder is not None:
        return read_folder(folder, first)
    # only images and boxes are read from the splits, so any image processor will do, of a size of its own
    data = replace(data, short_side=None, long_side=None, image_size=None, augmentation_short_sides=None)
    train, val = load_splits(data, load_image_processor(None))
    chosen = {"train": train, "val": val}[split].with_transform(None)
    examples = [chosen[index] for index in range(min(first, len(chosen)))]
    return ChosenImages(
        names=[f"{chosen.name}, image {example['target']['image_id']}" for example in examples],
        images=[example["image"] for example in examples],
        ground_truth=[ground_truth_rows(example["target"]) for example in examples],
        class_names=chosen.class_names,
    )


def read_folder(folder: str | Path, first: int | None = None) -> ChosenImages:
    """The first images of a folder in order of their names, upright; subfolders and hidden files are passed over.

    What is no readable image is skipped, with one warning.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"images {str(folder)!r}: there is no such folder")
    names, images, skipped = [], [], []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if len(images) == first:
            break
        try:
            images.append(read_upright(path))
            names.append(path.name)
        except DatasetError:
            skipped.append(path.name)
    shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    if not images:
        found = f"none of its {len(skipped)} files is a readable image ({shown})" if skipped else "it holds no file"
        raise DatasetError(f"images {str(folder)!r}: {found}; give a folder that has images in it, not in subfolders")
    if skipped:
        logger.warning(f"{folder}: skipped {len(skipped)} files that are no readable image: {shown}")
    return ChosenImages(names, images, None, [])


def ground_truth_rows(target: dict) -> Tensor:
    """The boxes (n, 4) xyxy and class_labels (n,) of a target as rows (n, 6): x, y, width, height, score 1, label."""
    boxes, labels = target["boxes"], target["class_labels"]
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], torch.ones(len(boxes), 1), labels[:, None]], dim=1)


def common_classes(*class_names: Sequence[str]) -> tuple[list[str], list[Tensor]]:
    """One list of classes for data and models whose labels differ, by name (case and surrounding space aside).

    Args:
        class_names: per source the name of each of its labels.

    Returns:
        Every name once, in order of appearance; per source int64 (C,), the place of each of its labels in that list.
    """
    places, names, indices = {}, [], []
    for source in class_names:
        for name in source:
            if places.setdefault(str(name).strip().casefold(), len(names)) == len(names):
                names.append(str(name))
        indices.append(torch.tensor([places[str(name).strip().casefold()] for name in source], dtype=torch.int64))
    return names, indices


def relabelled(detections: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows (k, 6) with every label replaced by its place `index[label]` in the common list of classes."""
    return [torch.cat([rows[:, :5], index[rows[:, 5].long()][:, None].to(rows)], dim=1) for rows in detections]


def model_titles(*paths: str) -> list[str]:
    """What pictures call the models: the folders' names, with as many parent folders as tell them apart.

    Raises:
        PictureError: two are the same.
    """
    parts = [(Path(path).resolve() if Path(path).exists() else Path(path)).parts for path in paths]
    for length in range(1, 1 + max(map(len, parts))):
        titles = ["/".join(part[-length:]) for part in parts]
        # a checkpoint of a run in progress: its number alone says little
        if len(set(titles)) == len(titles) and not any(title.startswith("checkpoint-") for title in titles):
            short = [title if len(title) <= LONGEST_TITLE else f"{title[:12]}…{title[-17:]}" for title in titles]
            return short if len(set(short)) == len(short) else titles
    raise PictureError(f"the models are {', '.join(paths)}: give two different ones")


def detection_columns(
    chosen: ChosenImages, models: Mapping[str, tuple[Detector, BaseImageProcessor]], batch_size: int = 8
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """The columns of `draw_detection_grid`, ground truth first, then the models by title; and their class names.

    Raises:
        PictureError: a model's outputs are not finite.
    """
    own_names = [model.class_names for model, _ in models.values()]
    names, (of_data, *of_models) = common_classes(chosen.class_names, *own_names)
    columns = {} if chosen.ground_truth is None else {"ground truth": relabelled(chosen.ground_truth, of_data)}
    for (title, (model, processor)), index in zip(models.items(), of_models, strict=True):
        examples = ImagesForModel(chosen.images, chosen.names, processor)
        found = predict_detections(model, examples, batch_size, title)
        if not found.isfinite().all():
            raise PictureError(f"{title}: the outputs are not finite: it has diverged; take an earlier checkpoint")
        # the last rows may be empty, see `select_detections`
        columns[title] = relabelled([rows[rows[:, 4] >= 0] for rows in found], index)
    return columns, names


def draw_detection_pages(
    images: Sequence[Image.Image], columns: Mapping, class_names: Sequence[str], folder: Path, score_threshold=0.4
) -> list[Path]:
    """`draw_detection_grid` to `detections.png`, or to `detections_1.png`, ... of eight images each; the paths."""
    paths = []
    for start in range(0, len(images), ROWS_A_PAGE):
        rows = slice(start, start + ROWS_A_PAGE)
        page = "" if len(images) <= ROWS_A_PAGE else f"_{len(paths) + 1}"
        paths.append(folder / f"detections{page}.png")
        part = {title: detections[rows] for title, detections in columns.items()}
        draw_detection_grid(images[rows], part, class_names, paths[-1], score_threshold)
    return paths
