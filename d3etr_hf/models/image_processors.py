"""Which image processor goes with which family, loaded or new."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    ConditionalDetrImageProcessorPil,
    RTDetrImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from d3etr_hf.data.image_sizes import PIXEL_SETTINGS, fit_padding, set_image_size, size_of, takes_fixed_size
from d3etr_hf.data.transforms import resized_size
from d3etr_hf.errors import DetectorLoadError, ImageSizeError, one_line
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processor_checks import CHANNELS, check_settings
from d3etr_hf.models.loading import DEFAULT_FAMILY, FAMILIES
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.models.trial import library_errors

logger = logging.get_logger(__name__)

# Transformers' class, which it has for torchvision alone
RF_DETR = "RfDetrImageProcessor"
# what a saved one is tried on: settings that nothing can be made of are found before anything long
TRIED = np.zeros((CHANNELS, 8, 8), dtype=np.uint8)


class RfDetrImageProcessorPil(RTDetrImageProcessorPil):
    """RF-DETR's pixels without torchvision, which Transformers' only class for it needs.

    As that class it interpolates between the four nearest pixels even where it shrinks an image, without smoothing it
    first as Pillow does; saved, it is that class. By default as the authors' base model: squares of 560 pixels.
    """

    do_normalize = True
    do_pad = True
    size = {"height": 560, "width": 560}

    def resize(  # type: ignore[override]  # as Transformers' own PIL classes, without what only Pillow takes
        self, image: np.ndarray, size: Any, resample: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """An image (3, H, W) of uint8 at another size, float32.

        Args:
            image: the image.
            size: as the attribute `size`, in pixels.
            resample: bilinear, or None for it.
            kwargs: whatever else Transformers hands to a resize.

        Raises:
            ValueError: another interpolation than bilinear.
        """
        if resample not in (None, Image.Resampling.BILINEAR):
            raise ValueError(f"resample is {resample}: RF-DETR's image processor is bilinear (2) only")
        width, height = size.width, size.height
        if size.shortest_edge:
            width, height = resized_size(image.shape[:0:-1], size.shortest_edge, size.longest_edge)
        pixels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        return torch.nn.functional.interpolate(pixels[None], size=(height, width), mode="bilinear")[0].numpy()

    def to_dict(self) -> dict[str, Any]:
        """The settings, as those of Transformers' own class."""
        return super().to_dict() | {"image_processor_type": RF_DETR}


# of families for which Transformers names none that works without torchvision: what their checkpoints say
CLASSES: dict[str, type[BaseImageProcessor]] = {
    "d_fine": RTDetrImageProcessorPil,
    "dab-detr": ConditionalDetrImageProcessorPil,
    "rf_detr": RfDetrImageProcessorPil,
    "rt_detr_v2": RTDetrImageProcessorPil,
}

# of a new one, in pixels, where the class's own is not what the family's authors have
SIZES: dict[str, dict[str, int]] = {"lw_detr": {"height": 640, "width": 640}}


def image_processor_class(model_type: str) -> type[BaseImageProcessor]:
    """The class of a family's image processors.

    Args:
        model_type: the family, as Transformers calls it.
    """
    if model_type in CLASSES:
        return CLASSES[model_type]
    return getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])


def new_image_processor(model_type: str) -> BaseImageProcessor:
    """An image processor as a family's authors have it.

    Args:
        model_type: the family, as Transformers calls it.
    """
    made = image_processor_class(model_type)
    return made(size=SIZES[model_type]) if model_type in SIZES else made()


def require_fixed_size(
    model: Detector | OtherDetector | type[Detector], image_processor: BaseImageProcessor, what: str
) -> None:
    """Refuse padding for a model that does not read it: it would take the padded image for the image.

    Args:
        model: who sees the images, or its family.
        image_processor: who makes them.
        what: what the error calls the image processor.

    Raises:
        ImageSizeError: this one keeps an image's proportions, so that a batch of them is padded.
    """
    if model.reads_padding or takes_fixed_size(image_processor):
        return
    raise ImageSizeError(
        f"{what} keeps an image's proportions (its size is {dict(size_of(image_processor))}), so a batch is padded, "
        f"but a {model.title} reads no padding and its boxes would be those of the padded image: give the image "
        'processor (or its preprocessor_config.json) one fixed size, for example {"height": 640, "width": 640}'
    )


def image_processor_of(
    model_type: str,
    source: str | None,
    short_side: int | None = None,
    long_side: int | None = None,
    image_size: int | None = None,
    source_type: str | None = None,
) -> BaseImageProcessor:
    """The image processor of a family's model: as the one saved beside a checkpoint is set, else a new one.

    It is of the family's own class even where the checkpoint is of another (a teacher's): whoever loads a model reads
    its scores with it. Of another family's that takes images of another kind of size than this one, or normalised
    where it does not, nothing is taken over: the two models see pixels of their own.

    Args:
        model_type: the family.
        source: a folder or Hub id; None for a new one.
        short_side, long_side: the size in pixels to resize to, instead of the saved one.
        image_size: the same for a family that takes squares, their side.
        source_type: the family of the checkpoint, where it is not this one; two may share a class.

    Raises:
        DetectorLoadError: there is a saved one, and it cannot be read.
        DatasetError: the family is not sized in this way.
        ImageSizeError: the saved one pads, and the family reads no padding.
    """
    own: Any = new_image_processor(model_type)
    theirs = None if source is None else load_image_processor(source)
    of_one_kind = theirs is not None and takes_fixed_size(theirs) == takes_fixed_size(own)
    if type(theirs) is type(own) and (of_one_kind or source_type in (None, model_type)):
        own = theirs
    elif of_one_kind and theirs.do_normalize == own.do_normalize:
        own = type(own)(**{name: getattr(theirs, name) for name in PIXEL_SETTINGS})
    require_fixed_size(FAMILIES[model_type], own, f"the image processor of {source!r}")
    set_image_size(own, short_side, long_side, image_size)
    fit_padding(own)
    return own


def load_image_processor(
    path: str | None,
    short_side: int | None = None,
    long_side: int | None = None,
    model_type: str = DEFAULT_FAMILY,
    image_size: int | None = None,
) -> Any:
    """The image processor saved beside a checkpoint (None if there is none), or a new one where `path` is None.

    Args:
        short_side, long_side: the size in pixels to resize to, instead of the saved one.
        model_type: the family of a new one.
        image_size: as `short_side`, for a family that takes squares: their side.

    Raises:
        DetectorLoadError: there is one, and it cannot be read.
        DatasetError: it is not sized in this way.
    """
    processor = new_image_processor(model_type) if path is None else _saved_image_processor(path)
    if processor is not None:
        set_image_size(processor, short_side, long_side, image_size)
    return processor


def _saved_image_processor(path: str) -> BaseImageProcessor | None:
    file = Path(path) / IMAGE_PROCESSOR_NAME
    what = f"{path}: {IMAGE_PROCESSOR_NAME}"
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(path)
    except (OSError, RecursionError, ValueError) as error:
        if os.path.lexists(file):
            raise DetectorLoadError(
                f"{what} could not be read ({one_line(error)}); copy or download it again"
            ) from error
        logger.warning(f"{path} holds no image processor, so its pixel scaling cannot be checked")
        return None
    check_settings(settings, what)
    with library_errors(f"{what} could not be read, or makes no pixels of an image", "copy or download it again"):
        if settings.get("image_processor_type") == RF_DETR:
            processor = RfDetrImageProcessorPil.from_pretrained(path)
        else:
            processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        processor(TRIED, return_tensors="pt")
    return processor
