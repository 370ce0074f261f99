"""Stronger augmentation, as real-time detectors are trained: colours, zooming out, crops by overlap, four in one.

The recipe is RT-DETR's (its authors' numbers, after SSD); Pillow changes the colours. No library does it: torchvision
0.28 comes from the package index as a CUDA build, which fails beside a torch for CPUs ("operator torchvision::nms does
not exist").
"""

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance

from d3etr_hf.data.transforms import Augmentation

Example = tuple[Image.Image, torch.Tensor, torch.Tensor]  # image, boxes xyxy in pixels, class labels

COLORS = ((ImageEnhance.Brightness, 0.125), (ImageEnhance.Contrast, 0.5), (ImageEnhance.Color, 0.5))
HUE = 13  # of 256: a twentieth of the circle, to either side
SMALLEST_SCALE = 0.3  # of a crop's sides
OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # that a crop has with a box at least; 1: no crop
TRIES = 40
ASPECTS = (0.5, 2.0)
LARGEST_ZOOM = 4.0
MOSAIC_IMAGES = 4
EMPTY = (114, 114, 114)  # what no image covers


class StrongAugmentation(Augmentation):
    """Colours, zooming out and crops by overlap before the flip and the random size of `Augmentation`.

    Args:
        end: share of the training after which only flip and size are left.
        options: as `Augmentation`.
    """

    aspects = ASPECTS

    def __init__(self, end: float = 1.0, **options) -> None:
        super().__init__(**options)
        self.end = end

    def __call__(self, image: Image.Image, boxes: torch.Tensor, class_labels: torch.Tensor) -> Example:
        """As `Augmentation`; a box whose centre a crop leaves out is gone."""
        image = distorted(image)
        if torch.rand(()) < 0.5:
            image, boxes = zoomed_out(image, boxes)
        if torch.rand(()) < 0.8:
            image, boxes, class_labels = cropped_by_overlap(image, boxes, class_labels)
        return super().__call__(image, boxes, class_labels)

    def at(self, progress: float) -> Augmentation:
        """Without what has ended by then."""
        if progress < self.end:
            return self
        return Augmentation(self.short_sides, self.long_side, self.crop, self.batch_sizes)


def distorted(image: Image.Image) -> Image.Image:
    """With each of brightness, contrast, saturation and hue changed in every second image; RGB."""
    for enhance, most in COLORS:
        if torch.rand(()) < 0.5:
            image = enhance(image).enhance(_uniform(1 - most, 1 + most))
    if torch.rand(()) < 0.5:
        turned = int(torch.randint(-HUE, HUE + 1, ()))
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(tone + turned) % 256 for tone in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


def zoomed_out(image: Image.Image, boxes: torch.Tensor) -> tuple[Image.Image, torch.Tensor]:
    """The image somewhere on a grey canvas of up to four times its sides; boxes (n, 4) xyxy in pixels move with it."""
    zoom = _uniform(1.0, LARGEST_ZOOM)
    canvas = Image.new("RGB", (int(image.width * zoom), int(image.height * zoom)), EMPTY)
    left = int(torch.randint(0, canvas.width - image.width + 1, ()))
    top = int(torch.randint(0, canvas.height - image.height + 1, ()))
    canvas.paste(image, (left, top))
    return canvas, boxes + torch.tensor([left, top, left, top])


def cropped_by_overlap(image: Image.Image, boxes: torch.Tensor, class_labels: torch.Tensor) -> Example:
    """A crop that overlaps some box by a share that is drawn (IoU), with the boxes whose centres are in it.

    Boxes are not clipped. An image without boxes stays as it is, as does one for which the share is 1.
    """
    if not len(boxes):
        return image, boxes, class_labels
    while True:
        least = OVERLAPS[int(torch.randint(len(OVERLAPS), ()))]
        if least >= 1:
            return image, boxes, class_labels
        for _ in range(TRIES):
            region = _drawn_region(image.size)
            if region is None:
                continue
            kept, overlap = _within(boxes, torch.tensor(region, dtype=boxes.dtype))
            if kept.any() and overlap[kept].max() >= least:
                left, top = region[:2]
                moved = boxes[kept] - torch.tensor([left, top, left, top])
                return image.crop(region), moved, class_labels[kept]


def _drawn_region(size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """xyxy in pixels, of sides from three tenths to all of the image's; None where it would be too long or flat."""
    width, height = (max(1, int(side * _uniform(SMALLEST_SCALE, 1.0))) for side in size)
    if not ASPECTS[0] <= width / height <= ASPECTS[1]:
        return None
    left, top = (int(torch.randint(0, side - part + 1, ())) for side, part in zip(size, (width, height), strict=True))
    return left, top, left + width, top + height


def _within(boxes: torch.Tensor, region: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of boxes (n, 4) xyxy: whether the centre lies in a region (4,), and the IoU with it, (n,) each."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres > region[:2]) & (centres < region[2:])).all(1)
    common = (torch.minimum(boxes[:, 2:], region[2:]) - torch.maximum(boxes[:, :2], region[:2])).clamp(min=0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (region[2:] - region[:2]).prod() - common
    return inside, common / union


class Mosaic:
    """Four training images in one, each in a quarter of the canvas, touching in its middle.

    Args:
        share: of the images that become the first of four, 0..1.
        end: share of the training after which there are no more.
    """

    def __init__(self, share: float, end: float = 1.0) -> None:
        self.share = share
        self.end = end

    def __call__(self, first: Example, others: Callable[[int], Example], images: int, progress: float) -> Example:
        """The image, or it with three others of the data set, drawn with torch's global generator.

        Args:
            first: whose size the whole has, but for an odd pixel.
            others: reads an image of the data set by its row.
            images: of the data set.
            progress: share of the training that is done.
        """
        if progress >= self.end or torch.rand(()) >= self.share:
            return first
        rows = torch.randint(images, (MOSAIC_IMAGES - 1,)).tolist()
        width, height = (max(1, side // 2) for side in first[0].size)
        canvas = Image.new("RGB", (2 * width, 2 * height), EMPTY)
        boxes, class_labels = [], []
        for place, tile in enumerate([first, *map(others, rows)]):
            image, factors = _fitted(tile[0], width, height)
            left = width if place % 2 else width - image.width
            top = height if place // 2 else height - image.height
            canvas.paste(image, (left, top))
            boxes.append(tile[1] * torch.tensor(factors * 2) + torch.tensor([left, top, left, top]))
            class_labels.append(tile[2])
        return canvas, torch.cat(boxes), torch.cat(class_labels)


def _fitted(image: Image.Image, width: int, height: int) -> tuple[Image.Image, list[float]]:
    """The image as large as fits in its own proportions, and by what its sides were multiplied."""
    factor = min(width / image.width, height / image.height)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    resized = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    return resized, [size[0] / image.width, size[1] / image.height]


def _uniform(lowest: float, highest: float) -> float:
    return lowest + (highest - lowest) * float(torch.rand(()))
