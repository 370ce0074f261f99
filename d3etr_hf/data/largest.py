"""The largest batch that training can draw: as large as augmentation makes images, with as many objects as one has."""

import copy

import torch
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.image_sizes import size_of, takes_fixed_size
from d3etr_hf.data.strong_augmentation import MOSAIC_IMAGES
from d3etr_hf.data.transforms import Augmentation, CropSizes, DetectionTransform, resized_size

Sides = tuple[int, int]  # height and width in pixels


class LargestImages:
    """What the largest training images of a data set are, known from its annotations alone.

    Args:
        dataset: with a `DetectionTransform`.

    Attributes:
        images: of an epoch.
        objects: of the image that has most.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self.images = dataset.images_of_epoch
        together = 1 if dataset.mosaic is None else MOSAIC_IMAGES
        self.objects = together * int(dataset.object_counts().max())
        shapes = _shapes_of(dataset)
        if dataset.unlabeled is not None:
            shapes |= _shapes_of(dataset.unlabeled.images)
        transform: DetectionTransform = dataset.transform
        self._sides = drawn_sides(shapes, transform.image_processor, transform.augmentation)
        self._teacher_sides: list[Sides] = []
        if transform.teacher_processor is not None:
            cuts_only = copy.copy(transform.augmentation)
            if cuts_only is not None:
                cuts_only.short_sides, cuts_only.batch_sizes = None, ()
            self._teacher_sides = drawn_sides(shapes, transform.teacher_processor, cuts_only)

    def sides(self, images: int) -> Sides:
        """Height and width to which the largest batch of so many images is padded, pixels."""
        return _padded_sides(self._sides, images)

    def batch(self, like: dict, images: int) -> list[dict]:
        """The examples of the largest batch.

        Args:
            like: an example of the data set, which is made larger and given more objects.
            images: of the batch.
        """
        height, width = self.sides(images)
        large = {"pixel_values": _resized(like["pixel_values"], (height, width))}
        if self._teacher_sides:
            sides = _padded_sides(self._teacher_sides, images)
            large["teacher_pixel_values"] = _resized(like["teacher_pixel_values"], sides)
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(self.objects, 1)
        class_labels = torch.zeros(self.objects, dtype=torch.int64)
        size = torch.tensor([height, width])
        large["labels"] = like["labels"] | {"class_labels": class_labels, "boxes": boxes, "size": size}
        return [large] * images


def _shapes_of(dataset: DetectionDataset) -> set[Sides]:
    """Width and height of all images, each once, pixels."""
    table = dataset.rows.select_columns(["width", "height"]).with_format("arrow")[:]
    return set(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))


def drawn_sides(
    shapes: set[Sides], image_processor: BaseImageProcessor, augmentation: Augmentation | None
) -> list[Sides]:
    """The sides of the largest images that can be drawn of each shape.

    Args:
        shapes: width and height of images as they are, pixels.
        image_processor: that resizes them.
        augmentation: None for none.
    """
    size = size_of(image_processor)
    if takes_fixed_size(image_processor):
        batch_sizes = () if augmentation is None else augmentation.batch_sizes
        return list(batch_sizes) or [(size.height, size.width)]
    short_side, long_side = size.shortest_edge, size.longest_edge
    if augmentation is not None and augmentation.short_sides is not None:
        short_side, long_side = max(augmentation.short_sides), augmentation.long_side
    if augmentation is not None and augmentation.crop is not None:
        shapes = shapes | {cut for shape in shapes for cut in _extreme_crops(shape, augmentation.crop)}
    if augmentation is not None and augmentation.aspects is not None:
        shapes = shapes | {
            (round(max(shape) * aspect), max(shape)) for shape in shapes for aspect in augmentation.aspects
        }
    widths_and_heights = [resized_size(shape, short_side, long_side) for shape in shapes]
    return [(height, width) for width, height in widths_and_heights]


def _extreme_crops(shape: Sides, crop: CropSizes) -> list[Sides]:
    """Width and height of the widest and the tallest crops."""
    found = []
    for short_side in crop.resized_short_sides:
        (least_width, width), (least_height, height) = (
            (min(crop.smallest, side), min(crop.largest, side)) for side in resized_size(shape, short_side)
        )
        found += [(width, least_height), (least_width, height)]
    return found


def _padded_sides(sides: list[Sides], images: int) -> Sides:
    """Several images may be the tallest and the widest, one alone cannot be both."""
    if images == 1:
        return max(sides, key=lambda side: side[0] * side[1])
    return max(height for height, _ in sides), max(width for _, width in sides)


def _resized(image: torch.Tensor, sides: Sides) -> torch.Tensor:
    return torch.nn.functional.interpolate(image[None], size=sides, mode="bilinear")[0]
