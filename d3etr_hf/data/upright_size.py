"""The size of an image whose annotations name none."""

from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image

from d3etr_hf.data.images import DECODING_ERRORS, ORIENTATIONS_THAT_SWAP_SIDES
from d3etr_hf.files import regular_file

ANY = 1000, 1000  # in which no box is too thin to have an area


def upright_size(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height of an image in pixels, by its header alone, turned as its EXIF orientation asks.

    Of what is no image it is any size: `check_images` tells of all such at once, or leaves them out.

    Args:
        source: path of the file, or its bytes.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else regular_file(source)) as image:
            lying = image.getexif().get(ExifTags.Base.Orientation, 1) in ORIENTATIONS_THAT_SWAP_SIDES
            return image.size[::-1] if lying else image.size
    except DECODING_ERRORS:
        return ANY
