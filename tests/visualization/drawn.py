"""What tests of pictures share: an image, what a model sees of it, and looking for colours in what was drawn."""

import numpy as np
import torch
from PIL import Image

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))


def pixels_for(processor) -> dict[str, torch.Tensor]:
    """`IMAGE` alone, without padding, as `pixel_values` and `pixel_mask`."""
    return dict(processor(IMAGE, do_pad=False, return_tensors="pt"))


def pixels_of(picture, colour):
    """(rows, columns) of the pixels that have a colour (red, green, blue in 0..1)."""
    return np.nonzero((np.abs(picture / 255.0 - np.array(colour)) < 0.02).all(axis=2))
