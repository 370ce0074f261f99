"""What an image processor's settings make of an image: of which size its pixels are, and scaled how.

Families are of two kinds. Some resize by the short side, keep the proportions, and mask the padding of a batch; the
others take images of one fixed size, as a rule squares, whose proportions are lost, and know no padding.
"""

import math
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict

from d3etr_hf.errors import DatasetError

# what decides an image's pixels
PIXEL_SETTINGS = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def size_of(image_processor: BaseImageProcessor) -> SizeDict:
    """The size that an image processor resizes to, pixels; as `SizeDict` even where it was set as a plain dict."""
    return SizeDict(**dict(image_processor.size))


def takes_fixed_size(image_processor: BaseImageProcessor) -> bool:
    """Whether an image processor makes all images of one size, instead of keeping their proportions."""
    size = size_of(image_processor)
    return bool(size.height and size.width)


def set_image_size(
    image_processor: BaseImageProcessor,
    short_side: int | None = None,
    long_side: int | None = None,
    image_size: int | None = None,
) -> None:
    """Set the size in pixels that an image processor resizes to, in place; what is None stays as it is.

    Args:
        image_processor: of either kind.
        short_side, long_side: both, for one that keeps the proportions.
        image_size: side of the square, for one of a fixed size.

    Raises:
        DatasetError: the size is one of the other kind.
    """
    if takes_fixed_size(image_processor):
        if short_side is not None or long_side is not None:
            raise DatasetError(
                "short_side and long_side are given, but this model takes images of one fixed size, now "
                f"{image_processor.size['width']}×{image_processor.size['height']} pixels: give image_size instead, "
                "or leave the size out."
            )
        if image_size is not None:
            _set_size(image_processor, height=image_size, width=image_size)
        return
    if image_size is not None:
        raise DatasetError(
            f"image_size is {image_size}, but this model takes images by their short side, in their own proportions: "
            "give short_side and long_side instead, or leave the size out."
        )
    if short_side is not None:
        _set_size(image_processor, shortest_edge=short_side, longest_edge=long_side)


def _set_size(image_processor: Any, **sides: int) -> None:
    """Set the size, in pixels, and forget what images of another were padded to: a batch has its own largest sides."""
    image_processor.size, image_processor.pad_size = SizeDict(**sides), None


def fit_padding(image_processor: Any) -> None:
    """Forget a size to pad to, in place, that not every image fits into: all sides are padded to a batch's largest.

    Transformers would fail at the first image of another shape.
    """
    if image_processor.pad_size is None:
        return
    padded, size = SizeDict(**dict(image_processor.pad_size)), size_of(image_processor)
    heights, widths = (size.height, size.max_height), (size.width, size.max_width)
    height, width = (next(filter(None, (*sides, size.longest_edge)), math.inf) for sides in (heights, widths))
    if padded.height < height or padded.width < width:
        image_processor.pad_size = None


def describe_image_size(image_processor: BaseImageProcessor) -> dict[str, int]:
    """The size that an image processor resizes to, pixels: `height` and `width`, or `short_side` and `long_side`."""
    size = size_of(image_processor)
    if takes_fixed_size(image_processor):
        return {"height": size.height, "width": size.width}
    return {"short_side": size.shortest_edge, "long_side": size.longest_edge}


def differing_setting(student: BaseImageProcessor, teacher: BaseImageProcessor) -> str | None:
    """The first setting for which one model cannot see the other's pixels, with both values; None where it can.

    Of sizes only the kind counts: whether two models of one kind see images of one size is the run's choice.
    """
    for name in PIXEL_SETTINGS:
        ours, theirs = (_setting(image_processor, name) for image_processor in (student, teacher))
        if name == "size" and takes_fixed_size(student) == takes_fixed_size(teacher):
            continue
        if ours != theirs:
            return f"{name}: the student's is {ours}, the teacher's {theirs}"
    return None


def see_the_same(student: BaseImageProcessor, teacher: BaseImageProcessor) -> bool:
    """Whether two image processors make the same pixels of every image."""
    return all(_setting(student, name) == _setting(teacher, name) for name in PIXEL_SETTINGS)


def _setting(image_processor: BaseImageProcessor, name: str) -> Any:
    """A setting as it compares: sizes and colours may be of several types."""
    value = getattr(image_processor, name)
    if name == "size":
        return dict(size_of(image_processor))
    return tuple(value) if isinstance(value, list) else value
