"""From an image file of whatever kind to an upright 8-bit RGB image of the size that the annotations mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from d3etr_hf.errors import DatasetError, one_line
from d3etr_hf.files import regular_file

SIXTEEN_BIT_MODES = {"I", "I;16", "I;16L", "I;16B"}
ORIENTATIONS_THAT_SWAP_SIDES = {5, 6, 7, 8}


def read_rgb(source: str | Path | bytes, width: int, height: int, place: str) -> Image.Image:
    """Reads one image completely.

    A camera may store an image lying and ask, in its EXIF orientation, for it to be turned. Annotation tools disagree
    on whether boxes refer to the stored or to the turned image, so the annotated size decides; where both fit, EXIF is
    applied, as every viewer does.

    Args:
        source: path of the file, or its bytes.
        width, height: the image's size in the annotations, pixels.
        place: what an error message calls the image.

    Returns:
        RGB, 8 bits a channel, `width` × `height` pixels. 16-bit grey values are divided by 257, transparency is
        dropped.

    Raises:
        DatasetError: the file is missing, unreadable or truncated, of another size than annotated, or holds
            floating-point or 32-bit pixels.
    """
    with (
        _reading(place, "restore the file, or take it out of the annotations"),
        Image.open(BytesIO(source) if isinstance(source, bytes) else regular_file(source)) as image,
    ):
        _check_header(image, (width, height), place)
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        upright = _turned(image, orientation, (width, height), place)
        return _as_rgb(upright, place)


def read_upright(path: Path) -> Image.Image:
    """Reads one image without annotations completely, turned as its EXIF orientation asks; else as `read_rgb`.

    Raises:
        DatasetError: as `read_rgb`; the message names the file.
    """
    with _reading(str(path), "restore or remove the file"), Image.open(regular_file(path)) as image:
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image), str(path))


def check_head(path: Path) -> None:
    """Makes sure by the head of a file that it is an image; what is cut off further on is not noticed.

    Raises:
        DatasetError: it is none, or cannot be opened; the message names it.
    """
    with _reading(str(path), "restore or remove the file"), Image.open(regular_file(path)):
        pass


@contextmanager
def _reading(place: str, remedy: str) -> Iterator[None]:
    """The context in which a file that Pillow cannot read is one error."""
    try:
        yield
    except DatasetError:
        raise
    # Pillow's decoders raise any of these on damaged files; DecompressionBombError guards against absurd sizes.
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{place}: the image cannot be read ({one_line(error)}): {remedy}.") from error


def _check_header(image: Image.Image, annotated: tuple[int, int], place: str) -> None:
    """Refuses an image of another size before it is decoded, which a huge one would take memory for."""
    if annotated in (image.size, image.size[::-1]):
        return
    # only where it is known by now: some formats look for it by decoding
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1
    _turned(image, orientation, annotated, place)


def _turned(image: Image.Image, orientation: int, annotated: tuple[int, int], place: str) -> Image.Image:
    stored = image.size
    turned = stored[::-1] if orientation in ORIENTATIONS_THAT_SWAP_SIDES else stored
    if annotated == turned:
        return image if orientation == 1 else ImageOps.exif_transpose(image)
    if annotated == stored:
        return image
    orientation_note = f", {turned[0]}×{turned[1]} after its EXIF rotation" if turned != stored else ""
    raise DatasetError(
        f"{place}: the image is {stored[0]}×{stored[1]} pixels (width × height){orientation_note}, but the "
        f"annotations say {annotated[0]}×{annotated[1]}: their boxes would be misplaced; correct `width` and "
        "`height`, or put the right image in place."
    )


def _as_rgb(image: Image.Image, place: str) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DatasetError(
                f"{place}: pixel values {values.min()}..{values.max()} do not fit 16 bits: save the image with 8 or "
                "16 bits a channel."
            )
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise DatasetError(
            f"{place}: floating-point pixels have no agreed white: save the image with 8 or 16 bits a channel."
        )
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
