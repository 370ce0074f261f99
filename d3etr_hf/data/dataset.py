"""One split of a detection data set, as the Trainer takes it."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from d3etr_hf.data.images import read_rgb
from d3etr_hf.data.sampling import TrainingSample, drawing_from
from d3etr_hf.data.strong_augmentation import Mosaic
from d3etr_hf.errors import DatasetError

BOX_FEATURES = {
    "image_id": datasets.Value("int64"),
    "width": datasets.Value("int64"),
    "height": datasets.Value("int64"),
    "boxes": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
    "class_labels": datasets.List(datasets.Value("int64")),
}


class DetectionDataset(torch.utils.data.Dataset):
    """Images of one split with their boxes; made by `load_coco_split` and `load_hub_split`.

    Attributes:
        name: for messages and logs, for example `bccd/val`.
        class_names: name of each class label 0..C-1, in order of raw category id unless `with_class_order` said else.
        category_ids: raw category id of each class label.
        rows: one row an image: image_id int64; image_path (or image, undecoded, for Hub data); width, height in
            pixels; boxes (n, 4) float32 xyxy in pixels, inside the image, no crowds; class_labels (n,) int64.
        annotations_digest: a hash of the annotations as they were given; it changes with each of them.
        transform: called on `(image, target)` by `__getitem__`; None gives `{"image": ..., "target": ...}`.
        mosaic: puts four images into one, in training alone; None for none.
        unlabeled: images without labels beside it, in training alone; None for none.
    """

    mosaic: Mosaic | None = None
    unlabeled: "Unlabeled | None" = None

    def __init__(
        self,
        name: str,
        class_names: list[str],
        category_ids: list[int],
        rows: datasets.Dataset,
        load_ground_truth: Callable[[], dict],
        annotations_digest: str,
        transform: Callable[[Image.Image, dict[str, Any]], dict] | None = None,
    ) -> None:
        self.name = name
        self.class_names = class_names
        self.category_ids = category_ids
        self.rows = rows
        self.annotations_digest = annotations_digest
        self.transform = transform
        self._load_ground_truth = load_ground_truth

    @property
    def id2label(self) -> dict[int, str]:
        """Class name by class label, as a model's configuration takes it."""
        return dict(enumerate(self.class_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Class label by class name."""
        return {name: label for label, name in enumerate(self.class_names)}

    @cached_property
    def ground_truth(self) -> dict:
        """The COCO detection dictionary as it was given: raw category ids, boxes xywh in pixels, crowds and all."""
        return self._load_ground_truth()

    def object_counts(self) -> np.ndarray:
        """How many objects each image has, (n,) int64; crowds are none."""
        labels = self.rows.select_columns(["class_labels"]).with_format("arrow")[:]["class_labels"]
        return pc.list_value_length(labels).to_numpy().astype(np.int64)

    def with_transform(self, transform: Callable[[Image.Image, dict[str, Any]], dict] | None) -> "DetectionDataset":
        """The same split with another transform, which is that of its images without labels, too."""
        changed = copy.copy(self)
        changed.transform = transform
        if self.unlabeled is not None:
            changed.unlabeled = replace(self.unlabeled, images=self.unlabeled.images.with_transform(transform))
        return changed

    def select(self, indices: Iterable[int]) -> "DetectionDataset":
        """These rows only, with the ground truth of their images only."""
        selected = copy.copy(self)
        selected.rows = self.rows.select(indices)
        selected._load_ground_truth = partial(
            _ground_truth_of, self._load_ground_truth, frozenset(selected.rows["image_id"])
        )
        return selected

    def with_unlabeled(self, images: "DetectionDataset", ratio: float) -> "DetectionDataset":
        """The same split with images beside it that a teacher alone supervises; see `load_unlabeled`.

        Args:
            images: whose boxes are not read; they get this split's transform and mosaics.
            ratio: how many of them come for each image of this split.
        """
        joined = copy.copy(self)
        images = images.with_transform(self.transform)
        images.mosaic = self.mosaic
        joined.unlabeled = Unlabeled(images, ratio)
        return joined

    @property
    def images_of_epoch(self) -> int:
        """How many images an epoch of training has, those without labels among them."""
        return len(self) + (0 if self.unlabeled is None else self.unlabeled.in_epoch(len(self)))

    @property
    def trained_images(self) -> int:
        """How many images training reads, those without labels among them."""
        return len(self) + (0 if self.unlabeled is None else len(self.unlabeled.images))

    def with_class_names(self, class_names: list[str]) -> "DetectionDataset":
        """The same split whose classes have these names, in order of class label."""
        named = copy.copy(self)
        named.class_names = list(class_names)
        names = dict(zip(self.category_ids, class_names, strict=True))
        named._load_ground_truth = partial(_with_category_names, self._load_ground_truth, names)
        return named

    def with_class_order(self, class_names: Sequence[str]) -> "DetectionDataset":
        """The same split whose class labels are in another order; every object keeps its class.

        Args:
            class_names: those of this split, each once, in the new order.
        """
        order = [self.class_names.index(name) for name in class_names]
        new_labels = np.argsort(order)
        ordered = copy.copy(self)
        ordered.class_names = list(class_names)
        ordered.category_ids = [self.category_ids[label] for label in order]
        labels = self.rows.select_columns(["class_labels"])["class_labels"][:]
        column = {"class_labels": [new_labels[each].tolist() if each else [] for each in labels]}
        features = datasets.Features({"class_labels": BOX_FEATURES["class_labels"]})
        relabelled = datasets.Dataset.from_dict(column, features=features)
        ordered.rows = datasets.concatenate_datasets([self.rows.remove_columns("class_labels"), relabelled], axis=1)
        return ordered

    def with_name(self, name: str) -> "DetectionDataset":
        """The same split under another name."""
        named = copy.copy(self)
        named.name = name
        return named

    def read_image(self, index: int) -> Image.Image:
        """The image, upright, RGB, 8 bits a channel, of the annotated size.

        Raises:
            DatasetError: the image cannot be read, or is not of the annotated size.
        """
        return self._read_image(self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | TrainingSample) -> dict:
        """`transform(image, target)`; the target holds `image_id` int, `boxes` (n, 4) float32 xyxy in pixels of the
        image, and `class_labels` (n,) int64.

        Args:
            index: the row; as a `TrainingSample` the transform draws from a seed of the image and the epoch, through
                torch's global generator, and the sample is in what is returned as `sample`. Rows beyond this split's
                are those of its images without labels, which `labeled`, false, tells in what is returned.
        """
        if not isinstance(index, TrainingSample):
            return self._example(self.rows[index])
        if self.unlabeled is not None and index.index >= len(self):
            inside = index._replace(index=index.index - len(self))
            return self.unlabeled.images[inside] | {"sample": index, "labeled": False}
        row = self.rows[index.index]
        with drawing_from(index.image_seed(row["image_id"])):
            return self._example(row, index.progress) | {"sample": index}

    def _example(self, row: dict, progress: float | None = None) -> dict:
        """
        Args:
            progress: share of the training that is done; None outside of training.
        """
        found = self._read_example(row)
        if self.mosaic is not None and progress is not None:
            found = self.mosaic(found, lambda index: self._read_example(self.rows[index]), len(self), progress)
        image, boxes, class_labels = found
        target = {"image_id": row["image_id"], "boxes": boxes, "class_labels": class_labels}
        if self.transform is None:
            return {"image": image, "target": target}
        try:
            return self.transform(image, target if progress is None else target | {"progress": progress})
        except DatasetError as error:
            raise DatasetError(f"{self.place_of(row)}: {error}") from error

    def _read_example(self, row: dict) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
        """The image, its boxes (n, 4) float32 xyxy in pixels, and class labels (n,) int64."""
        boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
        return self._read_image(row), boxes, torch.tensor(row["class_labels"], dtype=torch.int64)

    def __getstate__(self) -> dict:
        """Without the parsed ground truth: hundreds of megabytes that data loader workers do not need, and that a copy
        must not keep where its rows change."""
        return {key: value for key, value in self.__dict__.items() if key != "ground_truth"}

    def _read_image(self, row: dict) -> Image.Image:
        return read_rgb(source_of(row), row["width"], row["height"], self.place_of(row))

    def place_of(self, row: dict) -> str:
        """What a message calls the image of a row: its file, or else its id."""
        source = source_of(row)
        return source if isinstance(source, str) else f"{self.name}, image {row['image_id']}"


@dataclass(frozen=True)
class Unlabeled:
    """Images that a teacher alone supervises: they have no ground truth, which is not the same as no objects.

    Attributes:
        images: with the transform of the split that they stand beside.
        ratio: how many of them come for each image of that split.
    """

    images: DetectionDataset
    ratio: float

    def in_epoch(self, labeled: int) -> int:
        """How many of their turns an epoch of so many labelled images has, at least one."""
        return max(1, round(self.ratio * labeled))


def source_of(row: dict) -> str | bytes:
    """Path or content of a row's image."""
    if "image_path" in row:
        return row["image_path"]
    stored = row["image"]
    return stored["path"] if stored["bytes"] is None else stored["bytes"]


def _ground_truth_of(load: Callable[[], dict], image_ids: frozenset[int]) -> dict:
    coco = load()
    return {
        **coco,
        "images": [image for image in coco["images"] if image["id"] in image_ids],
        "annotations": [region for region in coco["annotations"] if region["image_id"] in image_ids],
    }


def _with_category_names(load: Callable[[], dict], names: dict[int, str]) -> dict:
    coco = load()
    return {**coco, "categories": [{**each, "name": names[each["id"]]} for each in coco["categories"]]}
