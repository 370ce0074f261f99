"""From an image and its target to what the model takes, with the augmentations of DETR.

All randomness comes from torch's global generator, so that the Trainer's seeding, data loader workers and resuming
govern it.
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
    """Horizontal flip of every second image, for half of them a random crop if asked for, and a random resize."""

    def __init__(self, short_sides: Sequence[int], long_side: int, crop: CropSizes | None = None) -> None:
        """
        Args:
            short_sides: one is drawn for each image, pixels.
            long_side: at most, pixels; the short side gives way.
            crop: None leaves the crop out.
        """
        self.short_sides = short_sides
        self.long_side = long_side
        self.crop = crop

    def __call__(
        self, image: Image.Image, boxes: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
        """Augments one image.

        Args:
            image: RGB.
            boxes: (n, 4) float32, xyxy in pixels of the image.
            class_labels: (n,) int64.

        Returns:
            The same for the augmented image, whose boxes are clipped to it; boxes outside of it are gone, so it may
            have none.
        """
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = torch.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)

        region, proportions = (0, 0, image.width, image.height), image.size
        if self.crop is not None and torch.rand(()) < 0.5:
            region, proportions = random_region(image.size, self.crop)
        width, height = resized_size(proportions, _draw(self.short_sides), self.long_side)
        # Crop and both resizes in one step: the same geometry as one after the other, with one interpolation.
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=region)

        left, top, right, bottom = region
        across, down = width / (right - left), height / (bottom - top)
        boxes = (boxes - torch.tensor([left, top, left, top])) * torch.tensor([across, down, across, down])
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
        kept = (boxes[:, 2:] - boxes[:, :2] > THINNEST_SIDE).all(1)
        return image, boxes[kept], class_labels[kept]


def random_region(size: tuple[int, int], crop: CropSizes) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Draws DETR's crop as a region of the original image.

    Args:
        size: width and height of the original image, pixels.
        crop: sizes, in pixels of the resized image.

    Returns:
        The region, xyxy in pixels of the original image, and its width and height in pixels of the resized image.
    """
    width, height = resized_size(size, _draw(crop.resized_short_sides), None)
    crop_width = _draw_integer(min(crop.smallest, width), min(crop.largest, width))
    crop_height = _draw_integer(min(crop.smallest, height), min(crop.largest, height))
    left, top = _draw_integer(0, width - crop_width), _draw_integer(0, height - crop_height)
    across, down = size[0] / width, size[1] / height
    # `min`: the product may exceed the image by a rounding error, which Pillow refuses.
    right, bottom = min((left + crop_width) * across, size[0]), min((top + crop_height) * down, size[1])
    return (left * across, top * down, right, bottom), (crop_width, crop_height)


def resized_size(size: tuple[int, int], short_side: int, long_side: int | None) -> tuple[int, int]:
    """Width and height after the image processor's resize of an image of this width and height, pixels."""
    height, width = get_size_with_aspect_ratio((size[1], size[0]), short_side, long_side)
    return width, height


class DetectionTransform:
    """`(image, target)` of a `DetectionDataset` to the model's `pixel_values` and `labels`.

    Without augmentation the image processor resizes, as at inference; with it the augmentation does. Either way the
    processor rescales and normalises, one image at a time: given a batch it would normalise boxes by the padded size.
    """

    def __init__(self, image_processor: BaseImageProcessor, augmentation: Augmentation | None = None) -> None:
        self.image_processor = image_processor
        self.augmentation = augmentation

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> dict:
        """Makes one example.

        Args:
            image: RGB.
            target: `image_id` int, `boxes` (n, 4) float32 xyxy in pixels of the image, `class_labels` (n,) int64.

        Returns:
            `pixel_values` (3, H, W) float32, and `labels` with `image_id` (1,), `class_labels` (n,), `boxes` (n, 4)
            float32 cxcywh in 0..1 of the H × W image, `orig_size` (2,) height and width of the given image and `size`
            (2,) H and W; integers are int64.

        Raises:
            DatasetError: the image is so narrow that no pixel is left of its short side.
        """
        original_size = (image.height, image.width)
        boxes, class_labels = target["boxes"], target["class_labels"]
        try:
            if self.augmentation is not None:
                image, boxes, class_labels = self.augmentation(image, boxes, class_labels)
            processed = self.image_processor(
                image, do_resize=self.augmentation is None, do_pad=False, return_tensors="pt"
            )
        except ValueError as error:
            raise DatasetError(
                f"image {target['image_id']} of {original_size[1]}×{original_size[0]} pixels cannot be resized "
                f"({error}): take it out of the annotations, or raise `long_side`."
            ) from error
        pixel_values = processed["pixel_values"][0]
        corners = boxes / torch.tensor([image.width, image.height, image.width, image.height])
        labels = {
            "image_id": torch.tensor([target["image_id"]]),
            "class_labels": class_labels,
            "boxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1),
            "orig_size": torch.tensor(original_size),
            "size": torch.tensor(pixel_values.shape[1:]),
        }
        return {"pixel_values": pixel_values, "labels": labels}


def _draw(values: Sequence[int]) -> int:
    return values[_draw_integer(0, len(values) - 1)]


def _draw_integer(lowest: int, highest: int) -> int:
    return int(torch.randint(lowest, highest + 1, ()))
