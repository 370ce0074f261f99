"""The headers of all images of a split: what is broken or wrongly described is found before training, and at once.

What was found is kept in the cache of `datasets`, unless the system refused to read a file: a second call only asks
for the sizes and times of the files.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO

import datasets
import PIL
import pyarrow.compute as pc
from PIL import Image
from tqdm.auto import tqdm

from d3etr_hf.data.dataset import DetectionDataset, source_of
from d3etr_hf.data.images import (
    DECODING_ERRORS,
    ORIENTATIONS_THAT_SWAP_SIDES,
    ImageFault,
    decode,
    header_fault,
    known_orientation,
    unreadable,
)
from d3etr_hf.errors import WriteError
from d3etr_hf.files import regular_file, write_whole

logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when more is looked for.
READER_VERSION = 2
SAMPLED = 4096  # bytes of the beginning and of the end
ROWS_AT_ONCE = 256
THREADS = 8  # reading waits for disks and networks
SECONDS_WITHOUT_BAR = 3


@dataclass(frozen=True)
class ImageHeader:
    """What is known of one image without decoding it.

    Attributes:
        fingerprint: a hash of its length, beginning and end; images of the same content have the same.
        fault: why it cannot be used; None where the header is sound.
        unturned: whether its EXIF orientation turns it, though the annotations are of the image as it is stored.
    """

    fingerprint: str
    fault: ImageFault | None = None
    unturned: bool = False


def read_headers(
    dataset: DetectionDataset, cache_dir: str | Path | None = None, decode_all: bool = False
) -> list[ImageHeader]:
    """The headers of all images of a split, one a row; with a progress bar where it takes long.

    An image is decoded only where its end is not that of a whole file, or its size fits an orientation that is not
    known before.

    Args:
        dataset: of any format.
        cache_dir: where what was found is kept; by default `d3etr_hf` in the cache of `datasets`.
        decode_all: decode every image, which finds damage in the middle of a file, too.
    """
    key = _key(dataset, decode_all)
    kept_file = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "d3etr_hf") / f"headers-{key}.json"
    if key is not None and (kept := _read_kept(kept_file, len(dataset))) is not None:
        return kept
    headers: list[ImageHeader] = []
    bar = tqdm(total=len(dataset), desc=f"image headers of {dataset.name}", delay=SECONDS_WITHOUT_BAR)
    with bar, ThreadPoolExecutor(THREADS) as threads:
        for rows in _rows_of(dataset):
            headers += threads.map(partial(_read_header, decode_all=decode_all), rows)
            bar.update(len(rows))
    if key is not None and not any(header.fault and header.fault.passing for header in headers):
        _keep(headers, kept_file)
    return headers


def _rows_of(dataset: DetectionDataset) -> Iterator[list[dict]]:
    images = "image_path" if "image_path" in dataset.rows.column_names else "image"
    columns = dataset.rows.select_columns([images, "width", "height"])
    for start in range(0, len(columns), ROWS_AT_ONCE):
        yield list(columns.select(range(start, min(start + ROWS_AT_ONCE, len(columns)))))


def _read_header(row: dict, decode_all: bool) -> ImageHeader:
    source, width, height = source_of(row), row["width"], row["height"]
    fingerprint = ""
    try:
        with BytesIO(source) if isinstance(source, bytes) else open(regular_file(source), "rb") as file:
            start, end, length = _sample(file)
            fingerprint = hashlib.blake2b(b"%d" % length + start + end, digest_size=8).hexdigest()
            with Image.open(file) as image:
                if fault := header_fault(image, width, height):
                    return ImageHeader(fingerprint, fault)
                orientation, stored = known_orientation(image), image.size
                whole = _ends_as_it_should(image.format, start, end, length)
    except DECODING_ERRORS as error:
        return ImageHeader(fingerprint, unreadable(error))
    turns = orientation in ORIENTATIONS_THAT_SWAP_SIDES
    if decode_all or not whole or (stored != (width, height) and not turns):
        decoded = decode(source, width, height)
        if isinstance(decoded, ImageFault):
            return ImageHeader(fingerprint, decoded)
    return ImageHeader(fingerprint, unturned=turns and stored == (width, height) and width != height)


def _sample(file: IO[bytes]) -> tuple[bytes, bytes, int]:
    """Beginning, end and length of a file."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(SAMPLED)
    file.seek(max(length - SAMPLED, 0))
    end = file.read()
    file.seek(0)
    return start, end, length


def _ends_as_it_should(image_format: str | None, start: bytes, end: bytes, length: int) -> bool:
    """Whether a file is whole as far as its end tells; false of formats whose end says nothing."""
    if image_format == "PNG":
        return end.endswith(b"IEND\xaeB`\x82")
    if image_format == "JPEG":
        return end.rstrip(b"\0").endswith(b"\xff\xd9")
    if image_format == "GIF":
        return end.endswith(b";")
    if image_format == "WEBP":
        return int.from_bytes(start[4:8], "little") + 8 <= length
    return False


def _key(dataset: DetectionDataset, decode_all: bool) -> str | None:
    """What decides what is found: sizes, and of each file length and time; None of images that are in memory alone."""
    digest = hashlib.sha256(json.dumps([READER_VERSION, PIL.__version__, decode_all]).encode())
    embedded = False
    for table in dataset.rows.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        if "image_path" in table.column_names:
            paths, lengths = table["image_path"].to_pylist(), [None] * len(table)
        else:
            images = table["image"]
            lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
            paths = pc.struct_field(images, "path").to_pylist()
        embedded = embedded or any(length is not None for length in lengths)
        for path, length, *sides in zip(
            paths, lengths, table["width"].to_pylist(), table["height"].to_pylist(), strict=True
        ):
            digest.update(json.dumps([*sides, _state(path) if length is None else length]).encode())
    if embedded:
        files = [file["filename"] for file in dataset.rows.cache_files]
        if not files:
            return None
        digest.update(json.dumps([dataset.rows["image_id"][:], *map(_state, files)]).encode())
    return digest.hexdigest()


def _state(path: str) -> list:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return [path]
    return [path, state.st_size, state.st_mtime_ns]


def _keep(headers: list[ImageHeader], file: Path) -> None:
    others = {index: asdict(header) for index, header in enumerate(headers) if header.fault or header.unturned}
    content = {"fingerprints": [header.fingerprint for header in headers], "others": others}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # of this process's own name until it is whole
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        write_whole(unfinished, json.dumps(content))
        os.replace(unfinished, file)
    except (OSError, WriteError) as error:
        logger.warning("what was found in the images' headers cannot be kept (%s)", error)


def _read_kept(file: Path, count: int) -> list[ImageHeader] | None:
    """The headers that were found before; None where there are none, or the file is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        headers = [ImageHeader(fingerprint) for fingerprint in content["fingerprints"]]
        for index, other in content["others"].items():
            fault = None if other["fault"] is None else ImageFault(**other["fault"])
            headers[int(index)] = ImageHeader(other["fingerprint"], fault, other["unturned"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        logger.warning("%s is damaged, and is made anew", file)
        return None
    return headers if len(headers) == count else None
