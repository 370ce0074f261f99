"""The size of an image whose annotations name none."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from d3etr_hf.data.images import DECODING_ERRORS, upright_size_of
from d3etr_hf.files import regular_file

# Of a broken image, whose objects are left out with it: any size will do, as `check_images` finds by its file what is
# wrong.
SIZE_OF_BROKEN = (1, 1)


def upright_size(source: str | Path | bytes) -> tuple[int, int] | None:
    """Width and height of an image in pixels, by its header alone, turned as its EXIF orientation asks.

    Args:
        source: path of the file, or its bytes.

    Returns:
        None of a file that cannot be read, or is no image.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else regular_file(source)) as image:
            return upright_size_of(image)
    except DECODING_ERRORS:
        return None
