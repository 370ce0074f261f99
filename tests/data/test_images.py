import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from transformers.image_utils import load_image

from d3etr_hf.data.images import DEEP_PIXELS, REMEDIES, read_rgb
from d3etr_hf.errors import DatasetError

# What each EXIF orientation asks a viewer to do with the stored pixels (rows, columns, channels).
EXIF_MEANING = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
# that a file of each kind can hold
MODES = {
    "png": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "jpg": ["1", "L", "RGB", "CMYK", "YCbCr"],
    "tiff": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"],
    "gif": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "webp": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "bmp": ["1", "L", "P", "RGB", "RGBA"],
}


def random_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_turned(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def read(path: Path, width: int, height: int) -> np.ndarray:
    image = read_rgb(path, width, height, str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_that_the_annotations_follow(tmp_path: Path, orientation: int) -> None:
    """Guards against boxes on a lying image, for all eight orientations."""
    pixels = random_pixels(4, 6)
    expected = EXIF_MEANING[orientation](pixels)
    path = write_turned(tmp_path / "a.png", pixels, orientation)
    np.testing.assert_array_equal(read(path, expected.shape[1], expected.shape[0]), expected)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_orientation_that_the_annotations_ignore(tmp_path: Path, orientation: int) -> None:
    """Guards against turning an image whose boxes were drawn on the stored pixels."""
    pixels = random_pixels(4, 6)
    path = write_turned(tmp_path / "a.png", pixels, orientation)
    np.testing.assert_array_equal(read(path, 6, 4), pixels)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_of_a_square_is_applied(tmp_path: Path, orientation: int) -> None:
    """Guards the rule where the size cannot decide."""
    pixels = random_pixels(5, 5)
    path = write_turned(tmp_path / "a.png", pixels, orientation)
    np.testing.assert_array_equal(read(path, 5, 5), EXIF_MEANING[orientation](pixels))


def test_an_image_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    """Guards against misplaced boxes where images were shrunk after annotation."""
    path = write_turned(tmp_path / "a.png", random_pixels(4, 6), 6)
    with pytest.raises(DatasetError, match=r"a\.png: the image is 6×4 .* 4×6 after its EXIF rotation.* say 12×8"):
        read(path, 12, 8)


def test_swapped_sides_without_exif_are_refused(tmp_path: Path) -> None:
    """Guards against taking a swap of `width` and `height` in the JSON for a rotation."""
    Image.fromarray(random_pixels(4, 6)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png: the image is 6×4 pixels \(width × height\), but .* say 4×6"):
        read(tmp_path / "a.png", 4, 6)


@pytest.mark.parametrize(
    ("dtype", "suffix", "message"),
    [
        (np.uint16, "png", r"grey values of 16 or 32 bits .*WHITE is 65535 for 16 bits and 4095 for 12"),
        (np.uint16, "tiff", r"grey values of 16 or 32 bits"),
        (np.int32, "tiff", r"grey values of 16 or 32 bits"),
        (np.float32, "tiff", "floating-point numbers .* 8 bits a channel"),
    ],
)
def test_pixels_that_pipelines_would_clip_are_refused(tmp_path: Path, dtype: type, suffix: str, message: str) -> None:
    """Guards against training on other values than the published detector reads of the same file."""
    Image.fromarray(np.array([[0, 300], [4000, 60000]]).astype(dtype)).save(tmp_path / f"a.{suffix}")
    assert np.asarray(load_image(str(tmp_path / f"a.{suffix}")))[..., 0].tolist() == [[0, 255], [255, 255]]
    with pytest.raises(DatasetError, match=rf"a\.{suffix}: the image holds {message}"):
        read(tmp_path / f"a.{suffix}", 2, 2)


def test_the_remedy_for_sixteen_bits_works(tmp_path: Path) -> None:
    """Guards the line of code in the message, which people copy."""
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    numpy, WHITE = np, 65535
    line = re.search(r"Image\.fromarray\(.*\('uint8'\)\)", REMEDIES[DEEP_PIXELS])[0]
    eval(line, {"Image": Image, "numpy": numpy, "image": image, "WHITE": WHITE}).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png", 3, 1)[..., 0].tolist() == [[0, 127, 255]]


def saved_as(mode: str, colour: object, suffix: str, path: Path, **options: object) -> Path:
    path = path / f"a.{suffix}"
    Image.new(mode, (6, 4), colour).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 90, "png", (90, 90, 90)),
        ("L", 90, "jpg", (90, 90, 90)),
        ("1", 1, "png", (255, 255, 255)),
        ("LA", (90, 10), "png", (90, 90, 90)),
        ("RGBA", (200, 100, 50, 0), "png", (200, 100, 50)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("CMYK", (255, 0, 0, 127), "tiff", (0, 128, 128)),
    ],
)
def test_colour_modes(tmp_path: Path, mode: str, colour: object, suffix: str, expected: tuple[int, int, int]) -> None:
    """Guards against arrays of one, two or four channels, and against inverted CMYK."""
    pixels = read(saved_as(mode, colour, suffix, tmp_path), 6, 4)
    assert pixels.shape == (4, 6, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (4, 6, 3)), atol=2)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_pixels_are_those_of_stock_pipelines(tmp_path: Path, suffix: str, mode: str) -> None:
    """Guards against a detector that is trained on other pixels than its stock `pipeline` reads of the same file."""
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(random_pixels(8, 12))
    image = image.convert("P").convert("PA") if mode == "PA" else as_mode(image, mode)
    image.save(path)
    np.testing.assert_array_equal(read(path, 12, 8), np.asarray(load_image(str(path))))


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "LAB":
        return image.convert(mode)
    return ImageCms.applyTransform(
        image, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    )


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128])])
@pytest.mark.filterwarnings("error")
def test_palette(tmp_path: Path, transparency: int | bytes | None) -> None:
    """Guards against palette indices taken for grey values, and Pillow's warning about transparent palettes."""
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 220, 40])
    image.putdata([0, 1])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    assert read(tmp_path / "a.png", 2, 1).tolist() == [[[200, 10, 20], [30, 220, 40]]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    """Guards against images that are half grey, and decoder errors that do not say which file."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_pixels(60, 80)).save(path)
    content = path.read_bytes()
    for share in (0, 0.01, 0.3, 0.8):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DatasetError, match=rf"a\.{suffix}: the image cannot be read"):
            read(path, 80, 60)


def test_files_that_are_no_image(tmp_path: Path) -> None:
    """Guards against a bare OSError for a text file, a folder or nothing at all."""
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "folder.png", "absent.png"):
        with pytest.raises(DatasetError, match=rf"{name}: the image cannot be read"):
            read(tmp_path / name, 6, 4)


def test_an_image_from_bytes() -> None:
    """Guards reading of Hub data, which hold the file's content."""
    pixels = random_pixels(4, 6)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    np.testing.assert_array_equal(np.asarray(read_rgb(stream.getvalue(), 6, 4, "row 1")), pixels)


@pytest.mark.filterwarnings("ignore:.*[Tt]ag|Corrupt|Truncated:UserWarning")
def test_every_byte_of_damage_is_read_or_refused() -> None:
    """Guards against a decoder error of another type, which would end training without naming the file."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    generator = np.random.default_rng(1)
    refused = 0
    for suffix in ("png", "jpeg", "tiff", "gif"):
        stream = BytesIO()
        options = {} if suffix == "gif" else {"exif": exif}
        Image.fromarray(random_pixels(8, 8)).save(stream, suffix, **options)
        for _ in range(150):
            damaged = bytearray(stream.getvalue())
            damaged[generator.integers(len(damaged))] = generator.integers(256)
            try:
                read_rgb(bytes(damaged), 8, 8, "row 1")
            except DatasetError as error:
                refused += 1
                assert "row 1: " in str(error)
    assert refused > 50
