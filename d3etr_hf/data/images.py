"""From an image file of whatever kind to an upright 8-bit RGB image of the size that the annotations mean.

Pixels are those that Transformers' own `load_image` and pipelines read, so that a detector sees in use what it saw in
training. Where that is no picture, as of 16-bit files, whose values above 255 all become white there, an image is
refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from d3etr_hf.errors import DatasetError, one_line
from d3etr_hf.files import regular_file

ORIENTATIONS_THAT_SWAP_SIDES = {5, 6, 7, 8}
# What Pillow's decoders raise on damaged files; DecompressionBombError guards against absurd sizes.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError)

UNREADABLE, OTHER_SIZE, DEEP_PIXELS = "unreadable", "of another size than annotated", "of more than 8 bits a channel"
REMEDIES = {
    UNREADABLE: "restore the file, or take it out of the annotations",
    OTHER_SIZE: ("their boxes would be misplaced; correct `width` and `height`, or put the right image in place"),
    DEEP_PIXELS: (
        "Transformers' pipelines would take all values above 255 for white; save all images with 8 bits a channel, "
        "scaled alike, for example as Image.fromarray((numpy.asarray(image) / WHITE * 255).astype('uint8')), where "
        "WHITE is 65535 for 16 bits and 4095 for 12"
    ),
}


@dataclass(frozen=True)
class ImageFault:
    """Why an image cannot be used.

    Attributes:
        kind: a key of `REMEDIES`.
        what: what is wrong, as the middle of a sentence.
        passing: whether the system refused to read it, as of a network that is down, which says nothing of the image.
    """

    kind: str
    what: str
    passing: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {REMEDIES[self.kind]}"


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
        RGB, 8 bits a channel, `width` × `height` pixels; transparency is dropped.

    Raises:
        DatasetError: the file is missing, unreadable or truncated, of another size than annotated, or holds grey
            values of more than 8 bits.
    """
    image = decode(source, width, height)
    if isinstance(image, ImageFault):
        raise DatasetError(f"{place}: {image}.")
    return image


def decode(source: str | Path | bytes, width: int, height: int) -> Image.Image | ImageFault:
    """What `read_rgb` returns, or why there is no such image."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else regular_file(source)) as image:
            # before it is decoded, which a huge one would take memory for
            if fault := header_fault(image, width, height):
                return fault
            image.load()
            upright = _turned(image, orientation_of(image), (width, height))
            return upright if isinstance(upright, ImageFault) else _as_rgb(upright)
    except DECODING_ERRORS as error:
        return unreadable(error)


def read_upright(path: Path) -> Image.Image:
    """Reads one image without annotations completely, turned as its EXIF orientation asks; else as `read_rgb`.

    Raises:
        DatasetError: as `read_rgb`; the message names the file.
    """
    with _opened(path) as image:
        width, height = upright_size_of(image)
    return read_rgb(path, width, height, str(path))


def check_head(path: Path) -> None:
    """Makes sure by the head of a file that it is an image of 8 bits; what is cut off further on is not noticed.

    Raises:
        DatasetError: it is none, or cannot be opened; the message names it.
    """
    with _opened(path) as image:
        if fault := header_fault(image, *image.size):
            raise DatasetError(f"{path}: {fault}.")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image that is opened and not decoded; what Pillow raises meanwhile is one error."""
    try:
        with Image.open(regular_file(path)) as image:
            yield image
    except DatasetError:
        raise
    except DECODING_ERRORS as error:
        raise DatasetError(f"{path}: {unreadable(error)}.") from error


def unreadable(error: Exception) -> ImageFault:
    """The fault of an image at which Pillow, or the system, raised this."""
    # the system's errors have a number, those of decoders have none
    passing = isinstance(error, OSError) and error.errno is not None
    return ImageFault(UNREADABLE, f"the image cannot be read ({one_line(error)})", passing)


def header_fault(image: Image.Image, width: int, height: int) -> ImageFault | None:
    """What is wrong with an image that is opened and not decoded, as far as that tells."""
    if image.mode == "F" or image.mode.startswith("I"):
        kind = "floating-point numbers" if image.mode == "F" else "grey values of 16 or 32 bits"
        return ImageFault(DEEP_PIXELS, f"the image holds {kind} (Pillow's mode {image.mode})")
    if (width, height) in (image.size, image.size[::-1]):
        return None
    turned = _turned(image, known_orientation(image), (width, height))
    return turned if isinstance(turned, ImageFault) else None


def known_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is not decoded, 1..8; 1 where decoding looks for it, or follows it."""
    return orientation_of(image) if "exif" in image.info else 1


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1..8."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def upright_size_of(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image, not decoded, after the turn that its EXIF orientation asks for."""
    return image.size[::-1] if orientation_of(image) in ORIENTATIONS_THAT_SWAP_SIDES else image.size


def _turned(image: Image.Image, orientation: int, annotated: tuple[int, int]) -> Image.Image | ImageFault:
    stored = image.size
    turned = stored[::-1] if orientation in ORIENTATIONS_THAT_SWAP_SIDES else stored
    if annotated == turned:
        return image if orientation == 1 else ImageOps.exif_transpose(image)
    if annotated == stored:
        return image
    orientation_note = f", {turned[0]}×{turned[1]} after its EXIF rotation" if turned != stored else ""
    return ImageFault(
        OTHER_SIZE,
        f"the image is {stored[0]}×{stored[1]} pixels (width × height){orientation_note}, but the annotations say "
        f"{annotated[0]}×{annotated[1]}",
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
