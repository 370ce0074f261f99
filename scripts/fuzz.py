"""Damaged inputs by the thousand: each must be read, or be one clear error, in bounded time and memory.

    python scripts/fuzz.py [inputs, 10000] [seed, 0]

COCO files, images, configuration files, Parquet files, and the configurations, weights and image processors of
checkpoints are changed at random and read as training reads them. Prints how often each kind ended how, and writes
what ended otherwise into the folder fuzz_failures; exits with 1 then.
"""

import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import datasets
import torch
from PIL import Image
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are the tests'

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments, load_coco_split, load_hub_split
from d3etr_hf.data.images import read_rgb
from d3etr_hf.errors import UserError
from d3etr_hf.evaluation.coco_average_precision import coco_average_precision
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector

SECONDS, BYTES = 20, 8 << 30  # that an input may take; the latter of addresses, libraries included
WIDTH, HEIGHT = 12, 8
# what damages more than a random byte does
WORDS = [
    b"null",
    b"-1",
    b"1e400",
    b"NaN",
    b"9" * 400,
    b"[" * 60,
    b"{",
    b"}",
    b'"',
    b"\\ud800",
    b"\0",
    b"*a",
    b"&a ",
    b"!!",
    b"\xff",
    b".",
]
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
COCO = {
    "images": [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}],
    "annotations": [BOX, {**BOX, "id": 2, "bbox": [0, 0, 3, 3]}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
CONFIGURATION = (
    b"data_folder: mine  # of COCO\nshort_side: 480\nlong_side: 800\naugmentation_short_sides: [448, 480]\n"
)


class TooLong(BaseException):
    """No `Exception`, and so not what a reader expects of a damaged file."""


def image_bytes(kind: str = "png") -> bytes:
    """A small image, as a file of this kind."""
    stream = BytesIO()
    Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB").save(stream, kind)
    return stream.getvalue()


def parquet_bytes() -> bytes:
    """Two rows in the Hub's object-detection schema."""
    row = {"image": {"bytes": image_bytes(), "path": None}, "width": WIDTH, "height": HEIGHT}
    objects = [{"bbox": [1.0, 1, 5, 5], "category": 1}]
    rows = [{**row, "image_id": image_id, "objects": objects} for image_id in (1, 2)]
    stream = BytesIO()
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False)).to_parquet(stream)
    return stream.getvalue()


def mutated(content: bytes, generator: random.Random) -> bytes:
    """The content after one or two changes: a byte, a word, a part taken out, a part twice."""
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 2)):
        start = generator.randrange(len(damaged) + 1)
        end = start + generator.choice([1, 1, 4, 20])
        part = damaged[start:end]
        damaged[start:end] = generator.choice(
            [bytes([generator.randrange(256)]), generator.choice(WORDS), b"", part * 2, part + generator.choice(WORDS)]
        )
    return bytes(damaged)


def read_coco_file(content: bytes, folder: Path) -> None:
    (folder / "a.json").write_bytes(content)
    (folder / "1.png").write_bytes(image_bytes())
    split = load_coco_split(folder / "a.json", folder, cache_dir=folder / "cache")
    coco_average_precision(split.ground_truth, [])
    split[0]


def read_image(content: bytes, folder: Path) -> None:
    (folder / "1.png").write_bytes(content)
    read_rgb(folder / "1.png", WIDTH, HEIGHT, "1.png")


def read_configuration(content: bytes, folder: Path) -> None:
    (folder / "a.yaml").write_bytes(content)
    parse_arguments((DataArguments,), [str(folder / "a.yaml")])


@cache
def checkpoint() -> dict[str, bytes]:
    """The files of a tiny detector's checkpoint, by name."""
    from tests.tiny import small_image_processor, tiny_model

    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        small_image_processor().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_checkpoint(name: str, content: bytes, folder: Path) -> None:
    """A checkpoint of which one file is damaged."""
    for other, whole in checkpoint().items():
        (folder / other).write_bytes(content if other == name else whole)
    if name == IMAGE_PROCESSOR_NAME:
        load_image_processor(str(folder))(torch.ones(3, 8, 8, dtype=torch.uint8).numpy(), return_tensors="pt")
    else:
        load_detector(str(folder))(torch.ones(1, 3, 64, 64))


def read_parquet(content: bytes, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "train-0.parquet").write_bytes(content)
    split = load_hub_split(folder / "data", "train", cache_dir=folder / "cache")
    coco_average_precision(split.ground_truth, [])
    split[0]


Reader = Callable[[bytes, Path], None]
# of each kind: what is damaged, what reads it, and how many of a hundred inputs are of it, as some are slow to read
KINDS: dict[str, tuple[Callable[[], bytes], Reader, int]] = {
    "coco": (lambda: json.dumps(COCO).encode(), read_coco_file, 25),
    "yaml": (lambda: CONFIGURATION, read_configuration, 24),
    **{kind: (lambda kind=kind: image_bytes(kind), read_image, 8) for kind in ("png", "jpeg", "gif", "tiff", "webp")},
    "parquet": (parquet_bytes, read_parquet, 1),
    **{
        name: (lambda name=name: checkpoint()[name], partial(read_checkpoint, name), share)
        for name, share in ((CONFIG_NAME, 5), (SAFE_WEIGHTS_NAME, 2), (IMAGE_PROCESSOR_NAME, 3))
    },
}


def outcome(read: Reader, content: bytes) -> str:
    """ "read" or "refused"; every other end raises."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(content, Path(folder))
        except UserError:
            return "refused"
    return "read"


def fuzz(inputs: int, seed: int, failures: Path | None = None) -> Counter:
    """How often each kind ended how. An input that ended otherwise is kept in the folder; without one it raises."""
    generator = random.Random(seed)
    counts: Counter = Counter()
    for kind, (make, read, share) in KINDS.items():
        whole = make()
        if outcome(read, whole) != "read":
            raise RuntimeError(f"{kind}: the whole input is refused")
        for index in range(max(inputs * share // 100, 1)):
            content = mutated(whole, generator)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                counts[kind, outcome(read, content)] += 1
            except (Exception, TooLong) as error:  # whatever it is, it is what is looked for
                if failures is None:
                    raise AssertionError(f"{kind}, input {index}: {content!r}") from error
                counts[kind, type(error).__name__] += 1
                failures.mkdir(exist_ok=True)
                (failures / f"{kind}_{index}").write_bytes(content)
                (failures / f"{kind}_{index}.txt").write_text(traceback.format_exc())
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return counts


def too_long(*_: object) -> None:
    """Ends an input that takes too long."""
    raise TooLong(f"more than {SECONDS} s")


def main() -> None:
    inputs, seed = [*map(int, sys.argv[1:]), *(10_000, 0)[len(sys.argv) - 1 :]]
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, too_long)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    failures = Path("fuzz_failures")
    shutil.rmtree(failures, ignore_errors=True)
    counts = fuzz(inputs, seed, failures)
    for (kind, end), count in sorted(counts.items()):
        print(f"{kind:<26} {end:<16} {count}")
    sys.exit(failures.exists())


if __name__ == "__main__":
    main()
