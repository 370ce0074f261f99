"""The size of an image whose annotations name none."""

from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image

from d3etr_hf.data.images import ORIENTATIONS_THAT_SWAP_SIDES
from d3etr_hf.errors import DatasetError, one_line
from d3etr_hf.files import regular_file


def upright_size(source: str | Path | bytes, place: str) -> tuple[int, int]:
    """Width and height of an image in pixels, by its header alone, turned as its EXIF orientation asks.

    Args:
        source: path of the file, or its bytes.
        place: what an error message calls the image.

    Raises:
        DatasetError: the file is missing, or no image.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else regular_file(source)) as image:
            lying = image.getexif().get(ExifTags.Base.Orientation, 1) in ORIENTATIONS_THAT_SWAP_SIDES
            return image.size[::-1] if lying else image.size
    # what Pillow's decoders raise on files that are damaged, or no images
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{place}: no readable image ({one_line(error)}): restore the file.") from error
