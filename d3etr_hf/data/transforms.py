"""From an image and its target to what the model takes, with the augmentations of DETR.

All randomness comes from torch's global generator, which in training is seeded for each image (`TrainingSample`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio

from d3etr_hf.errors import DatasetError

# Pixels. A box that only touches the crop keeps a sliver of rounding error, which is no object.
THINNEST_SIDE = 0.01


@dataclass(frozen=True)
class CropSizes:
    """DETR's random crop: resize the short side to one of `resized_short_sides`, cut out a rectangle of sides
    `smallest`..`largest` (or the whole side, where that is less). All in pixels."""

    resized_short_sides: tuple[int, ...] = (400, 500, 600)
    smallest: int = 384
    largest: int = 600

    def scaled(self, factor: float) -> "CropSizes":
        """For images that are trained at another short side than 800."""
        resized = tuple(max(1, round(side * factor)) for side in self.resized_short_sides)
        return CropSizes(resized, max(1, round(self.smallest * factor)), max(1, round(self.largest * factor)))


class Augmentation:
    """Horizontal flip of every second image, for half of them a random crop if asked for, and a random size.

    It leaves resizing to the image processor: pixels are interpolated once, and as at inference.

    Attributes:
        aspects: the least and largest width/height of crops that are of no `crop`; None where there are none.
    """

    aspects: tuple[float, float] | None = None

    def __init__(
        self,
        short_sides: Sequence[int] | None = None,
        long_side: int | None = None,
        crop: CropSizes | None = None,
        batch_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        """
        Args:
            short_sides: one is drawn for each image, pixels; None leaves the size to the image processor.
            long_side: at most, pixels; the short side gives way.
            crop: None leaves the crop out.
            batch_sizes: heights and widths in pixels, one of which is drawn for a whole batch (`DetectionCollator`),
                where all of its images are of one size; without any they stay as they are.
        """
        self.short_sides = short_sides
        self.long_side = long_side
        self.crop = crop
        self.batch_sizes = batch_sizes

    def __call__(
        self, image: Image.Image, boxes: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
        """Flips and crops one image.

        Args:
            image: RGB.
            boxes: (n, 4) float32, xyxy in pixels of the image.
            class_labels: (n,) int64.

        Returns:
            The same for the augmented image, not resized, whose boxes are clipped to it; boxes outside of it are
            gone, so it may have none.
        """
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = torch.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)
        if self.crop is not None and torch.rand(()) < 0.5:
            left, top, right, bottom = random_region(image.size, self.crop)
            image = image.crop((left, top, right, bottom))
            boxes = boxes - torch.tensor([left, top, left, top])
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([image.width, image.height] * 2))
        kept = (boxes[:, 2:] - boxes[:, :2] > THINNEST_SIDE).all(1)
        return image, boxes[kept], class_labels[kept]

    def at(self, progress: float) -> "Augmentation":
        """What is left of it when this share of the training is done."""
        return self

    def draw_size(self) -> dict[str, int] | None:
        """The size that one image is resized to, as image processors take it; None for the processor's own."""
        if self.short_sides is None:
            return None
        return {"shortest_edge": _draw(self.short_sides), "longest_edge": self.long_side}


def random_region(size: tuple[int, int], crop: CropSizes) -> tuple[int, int, int, int]:
    """Draws DETR's crop as a region of the original image, of whole pixels.

    Args:
        size: width and height of the original image, pixels.
        crop: sizes, in pixels of the resized image.

    Returns:
        The region, xyxy in pixels of the original image.
    """
    width, height = resized_size(size, _draw(crop.resized_short_sides))
    crop_width = _draw_integer(min(crop.smallest, width), min(crop.largest, width))
    crop_height = _draw_integer(min(crop.smallest, height), min(crop.largest, height))
    left, top = _draw_integer(0, width - crop_width), _draw_integer(0, height - crop_height)
    across, down = size[0] / width, size[1] / height
    left, right = _whole_pixels(left * across, (left + crop_width) * across, size[0])
    top, bottom = _whole_pixels(top * down, (top + crop_height) * down, size[1])
    return left, top, right, bottom


def _whole_pixels(start: float, end: float, side: int) -> tuple[int, int]:
    """Rounded, and at least one pixel inside of the side."""
    first = min(round(start), side - 1)
    return first, min(max(round(end), first + 1), side)


def resized_size(size: tuple[int, int], short_side: int, long_side: int | None = None) -> tuple[int, int]:
    """Width and height after an image processor's resize of an image of this width and height, pixels."""
    height, width = get_size_with_aspect_ratio((size[1], size[0]), short_side, long_side)
    return width, height


class DetectionTransform:
    """`(image, target)` of a `DetectionDataset` to the model's `pixel_values` and `labels`.

    The image processor resizes, to the size that an augmentation draws or else to its own, rescales and normalises,
    one image at a time: given a batch it would normalise boxes by the padded size. A teacher that must see other
    pixels than its student gets those that its own image processor makes of the same augmented image, as at inference.

    Args:
        image_processor: the model's own.
        augmentation: None leaves images as they are.
        teacher_processor: the teacher's; None where both see the same pixels.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        augmentation: Augmentation | None = None,
        teacher_processor: BaseImageProcessor | None = None,
    ) -> None:
        self.image_processor = image_processor
        self.augmentation = augmentation
        self.teacher_processor = teacher_processor

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> dict:
        """Makes one example.

        Args:
            image: RGB.
            target: `image_id` int, `boxes` (n, 4) float32 xyxy in pixels of the image, `class_labels` (n,) int64; in
                training `progress`, the share of it that is done.

        Returns:
            `pixel_values` (3, H, W) float32, and `labels` with `image_id` (1,), `class_labels` (n,), `boxes` (n, 4)
            float32 cxcywh in 0..1 of the H × W image, `orig_size` (2,) height and width of the given image and `size`
            (2,) H and W; integers are int64. With a teacher's processor `teacher_pixel_values` (3, H', W') float32,
            and with an augmentation that has any `batch_sizes`.

        Raises:
            DatasetError: the image is so narrow that no pixel is left of its short side.
        """
        original_size = (image.height, image.width)
        boxes, class_labels, size = target["boxes"], target["class_labels"], None
        if self.augmentation is not None:
            augmentation = self.augmentation.at(target.get("progress", 0.0))
            image, boxes, class_labels = augmentation(image, boxes, class_labels)
            size = augmentation.draw_size()
        try:
            example: dict[str, Any] = {"pixel_values": make_pixels(self.image_processor, image, size)}
            if self.teacher_processor is not None:
                example["teacher_pixel_values"] = make_pixels(self.teacher_processor, image)
        except ValueError as error:
            raise DatasetError(
                f"image {target['image_id']} of {original_size[1]}×{original_size[0]} pixels cannot be resized "
                f"({error}): take it out of the data, or raise `long_side`."
            ) from error
        corners = boxes / torch.tensor([image.width, image.height, image.width, image.height])
        example["labels"] = {
            "image_id": torch.tensor([target["image_id"]]),
            "class_labels": class_labels,
            "boxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1),
            "orig_size": torch.tensor(original_size),
            "size": torch.tensor(example["pixel_values"].shape[1:]),
        }
        if self.augmentation is not None and self.augmentation.batch_sizes:
            example["batch_sizes"] = self.augmentation.batch_sizes
        return example


def make_pixels(
    image_processor: BaseImageProcessor, image: Image.Image, size: dict[str, int] | None = None
) -> torch.Tensor:
    """What an image processor makes of one RGB image, without padding: (3, H, W) float32.

    Args:
        size: to resize to instead of the processor's own, pixels.

    Raises:
        ValueError: no pixel would be left of the image's short side.
    """
    options = {} if size is None else {"size": size}
    return image_processor(image, do_resize=True, do_pad=False, return_tensors="pt", **options)["pixel_values"][0]


def _draw(values: Sequence[int]) -> int:
    return values[_draw_integer(0, len(values) - 1)]


def _draw_integer(lowest: int, highest: int) -> int:
    return int(torch.randint(lowest, highest + 1, ()))
