"""What is in a split, in numbers: images, objects, classes, sizes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.image_sizes import describe_image_size, size_of, takes_fixed_size
from d3etr_hf.data.transforms import resized_size

# COCO's, pixels²
SMALL, MEDIUM = 32**2, 96**2
SIZES_NAMED = 3


@dataclass(frozen=True)
class Overview:
    """A split in numbers; crowds are no objects, and sizes of objects are those of their boxes.

    Attributes:
        name: the split's.
        objects: how many each image has, (n,) int64.
        image_sizes: how many images there are of each width and height, pixels.
        class_counts: objects of each class, (C,) int64.
        areas: of the boxes, (objects,) pixels².
        resized_areas: of the boxes after an image processor's resize, pixels²; None without one.
    """

    name: str
    objects: np.ndarray
    image_sizes: Counter
    class_counts: np.ndarray
    areas: np.ndarray
    resized_areas: np.ndarray | None


def overview_of(dataset: DetectionDataset, image_processor: BaseImageProcessor | None = None) -> Overview:
    """The numbers of a split, from its annotations alone.

    Args:
        dataset: of any format.
        image_processor: of the model that is to take the images.
    """
    columns = dataset.rows.select_columns(["width", "height", "boxes", "class_labels"])
    sizes: Counter = Counter()
    class_counts = np.zeros(len(dataset.class_names), dtype=np.int64)
    areas, shares = [np.zeros(0)], [np.zeros(0)]
    for row in columns:
        size = row["width"], row["height"]
        sizes[size] += 1
        class_counts += np.bincount(np.array(row["class_labels"], dtype=np.int64), minlength=len(class_counts))
        boxes = np.array(row["boxes"], dtype=np.float64).reshape(-1, 4)
        areas.append((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        shares.append(areas[-1] * _enlargement(size, image_processor))
    resized = None if image_processor is None else np.concatenate(shares)
    return Overview(dataset.name, dataset.object_counts(), sizes, class_counts, np.concatenate(areas), resized)


def _enlargement(size: tuple[int, int], image_processor: BaseImageProcessor | None) -> float:
    """By how much a resize multiplies areas."""
    if image_processor is None:
        return 1.0
    wanted = size_of(image_processor)
    if takes_fixed_size(image_processor):
        return wanted.width * wanted.height / (size[0] * size[1])
    width, height = resized_size(size, wanted.shortest_edge, wanted.longest_edge)
    return width * height / (size[0] * size[1])


def overview_table(
    overviews: Sequence[Overview], class_names: Sequence[str], image_processor: BaseImageProcessor | None = None
) -> str:
    """The numbers of several splits of the same classes side by side, as text."""
    lines = [("", *(each.name for each in overviews))]
    lines += [
        ("images", *(str(len(each.objects)) for each in overviews)),
        ("images without objects", *(str(int((each.objects == 0).sum())) for each in overviews)),
        ("image sizes", *(_sizes_in_words(each.image_sizes) for each in overviews)),
        ("objects", *(str(int(each.objects.sum())) for each in overviews)),
        ("objects an image", *(f"{each.objects.mean():.1f}, most {each.objects.max()}" for each in overviews)),
        ("small objects (< 32²)", *(_percent(each.areas < SMALL) for each in overviews)),
        ("large objects (≥ 96²)", *(_percent(each.areas >= MEDIUM) for each in overviews)),
    ]
    if image_processor is not None:
        size = ", ".join(f"{name} {value}" for name, value in describe_image_size(image_processor).items())
        lines += [
            (f"resized to {size}", *("" for _ in overviews)),
            ("  small objects", *(_percent(each.resized_areas < SMALL) for each in overviews)),
            ("  large objects", *(_percent(each.resized_areas >= MEDIUM) for each in overviews)),
        ]
    lines.append(("objects by class", *("" for _ in overviews)))
    counts = np.stack([each.class_counts for each in overviews], axis=1).tolist()
    lines += [(f"  {name}", *map(str, row)) for name, row in zip(class_names, counts, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _sizes_in_words(sizes: Counter) -> str:
    if len(sizes) <= SIZES_NAMED:
        return ", ".join(f"{width}×{height}" for (width, height), _ in sizes.most_common())
    sides = np.array(list(sizes))
    (low_width, low_height), (high_width, high_height) = sides.min(0), sides.max(0)
    return f"{low_width}..{high_width} × {low_height}..{high_height}"


def _percent(chosen: np.ndarray) -> str:
    return f"{100 * chosen.mean():.0f} %" if len(chosen) else "-"
