"""Detections on images of files or of a data set, ready to be drawn side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.data.image_lists import find_images
from d3etr_hf.data.images import read_upright
from d3etr_hf.errors import PictureError
from d3etr_hf.evaluation import predict_detections
from d3etr_hf.evaluation.image_detections import ImagesForModel, readable
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.visualization.detection_grid import draw_detection_grid

ROWS_A_PAGE = 8
LONGEST_TITLE = 30  # characters that fit over a column


@dataclass(frozen=True)
class ChosenImages:
    """What is drawn on one page: RGB images and their names; what only a data set has is None and empty for files.

    Attributes:
        ground_truth: per image (boxes, 6): x, y, width, height in pixels, 1, label.
        class_names: the name of each label of the ground truth.
    """

    names: list[str]
    images: list[Image.Image]
    ground_truth: list[Tensor] | None
    class_names: list[str]


@dataclass(frozen=True)
class ImageSource:
    """Images that are read when they are needed: of files, or of a split of a data set.

    Attributes:
        what: what errors call them all.
        numbers: by which users name each: its image id, or its place among the files from 1.
        names: of each.
        read: by place from 0 the image, RGB, and its ground truth as in `ChosenImages`, None for files.
        class_names: as in `ChosenImages`.
    """

    what: str
    numbers: list[int]
    names: list[str]
    read: Callable[[int], tuple[Image.Image, Tensor | None]]
    class_names: list[str]

    def pages(self, first: int) -> Iterator[ChosenImages]:
        """The first images, eight at a time."""
        count = min(first, len(self.names))
        for start in range(0, count, ROWS_A_PAGE):
            places = range(start, min(start + ROWS_A_PAGE, count))
            images, truth = zip(*map(self.read, places), strict=True)
            names = [self.names[place] for place in places]
            yield ChosenImages(names, list(images), None if truth[0] is None else list(truth), self.class_names)

    def place_of(self, number: int | None) -> int:
        """The place from 0 of the image of that number; None for the first.

        Raises:
            PictureError: there is none.
        """
        if number is None:
            return 0
        if number not in self.numbers:
            raise PictureError(
                f"image is {number}: {self.what} in {min(self.numbers)}..{max(self.numbers)}, the first of them "
                f"{', '.join(map(str, self.numbers[:3]))}"
            )
        return self.numbers.index(number)


def choose_images(named: Sequence[str] | None, data: DataArguments, split: str = "val") -> ImageSource:
    """The images of files, folders and patterns, or of a split ("train" or "val") of the data set that `data` names.

    Raises:
        PictureError: both are named, or neither.
        DatasetError: they cannot be read.
    """
    has_data = any((data.data_folder, data.dataset_name, data.train_annotations))
    if has_data == (named is not None):
        both = "not both" if has_data else "neither is there"
        raise PictureError(f"give 'images' or a data set (data_folder, dataset_name, or paths): {both}")
    if named is not None:
        return images_of_files(named)
    # only images and boxes are read from the splits, so any image processor will do, of a size of its own
    data = replace(data, short_side=None, long_side=None, image_size=None, augmentation_short_sides=None)
    train, val = load_splits(data, load_image_processor(None), trains=split == "train")
    chosen = {"train": train, "val": val}[split].with_transform(None)
    ids = [int(each) for each in chosen.rows["image_id"]]

    def read(place: int) -> tuple[Image.Image, Tensor]:
        example = chosen[place]
        return example["image"], ground_truth_rows(example["target"])

    what = f"{chosen.name} has {len(ids)} images, whose ids lie"
    return ImageSource(what, ids, [f"{chosen.name}, image {each}" for each in ids], read, chosen.class_names)


def images_of_files(named: Sequence[str]) -> ImageSource:
    """The images of files, folders and patterns, upright; see `find_images`.

    What is no image by its head is skipped, with one warning.

    Raises:
        DatasetError: they name no image.
    """
    files = readable(find_images(named), skip_broken_images=True)
    numbers = list(range(1, len(files) + 1))
    what = f"there are {len(files)} images, counted from 1 in the order in which they are drawn, so it must lie"
    return ImageSource(
        what, numbers, [path.name for path in files], lambda place: (read_upright(files[place]), None), []
    )


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
    source: ImageSource,
    models: Mapping[str, tuple[Detector, BaseImageProcessor]],
    folder: Path,
    first: int,
    batch_size: int = 8,
    score_threshold: float = 0.4,
) -> Iterator[tuple[Path, list[str]]]:
    """Draws the first images with what models find to `detections.png`, or to `detections_1.png`, ... of eight each.

    Yields:
        Each page's path and the names of its images, when it is written.
    """
    several = min(first, len(source.names)) > ROWS_A_PAGE
    for number, page in enumerate(source.pages(first), start=1):
        path = folder / (f"detections_{number}.png" if several else "detections.png")
        columns, names = detection_columns(page, models, batch_size)
        draw_detection_grid(page.images, columns, names, path, score_threshold)
        yield path, page.names
