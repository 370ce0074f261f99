"""Damaged inputs by the thousand: each must be read, or be one clear error, in bounded time and memory.

    python scripts/fuzz.py [inputs, 10000] [seed, 0]

COCO files, images, configuration files, Parquet files and their cached copies, checkpoints (configuration, weights,
image processor, what a run goes on from) are changed at random and read as training reads them. Prints how often each
kind ended how, the longest time and the peak memory, and writes what ended otherwise into the folder fuzz_failures;
exits with 1 then. A file outside that an input reads, or a program that it starts, is such an end.
"""

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models are the tests'

import datasets
import torch
from PIL import Image

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments, load_coco_split, load_hub_split
from d3etr_hf.data.images import read_rgb
from d3etr_hf.errors import UserError
from d3etr_hf.evaluation.coco_average_precision import coco_average_precision
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_teacher
from d3etr_hf.runs.inputs import Fingerprint, read_inputs
from d3etr_hf.runs.output_folder import check_output_folder
from d3etr_hf.training.checkpoints import newest_whole_checkpoint, seal
from tests.tiny import tiny_model

SECONDS, BYTES = 10, 8 << 30  # that an input may take; the latter of addresses, libraries included
OUTSIDE = "fuzz_outside.txt"  # a file beside the inputs, that none may read
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
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
    b"../fuzz_outside.txt",
    b"1000000000",
    b'{"a": 1}',
    b"[]",
]
ODD_VALUES = [None, True, -1, 0, 0.5, 7, 10**9, 2**63, 1e308, float("nan"), "", "a", f"../{OUTSIDE}", [], {}, [1] * 5]
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


def other_value(content: Any, generator: random.Random) -> Any:
    """What JSON holds with one value, wherever it is, odd, gone or under another name."""
    inner = list(content.items() if isinstance(content, dict) else enumerate(content))
    if not inner:
        return generator.choice(ODD_VALUES)
    place, value = generator.choice(inner)
    if isinstance(value, dict | list) and generator.random() < 0.8:
        content[place] = other_value(value, generator)
    elif isinstance(content, dict) and generator.random() < 0.2:
        content[generator.choice(["", "a", "model_type", "auto_map"])] = content.pop(place)
    else:
        content[place] = generator.choice(ODD_VALUES)
    return content


def mutated(content: bytes, generator: random.Random) -> bytes:
    """The content after one or two changes: a value of JSON, a byte, a word, a part taken out, a part twice."""
    if content[:1] == b"{" and generator.random() < 0.7:
        return json.dumps(other_value(json.loads(content), generator)).encode()
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


def read_parquet(content: bytes, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "train-0.parquet").write_bytes(content)
    split = load_hub_split(folder / "data", "train", cache_dir=folder / "cache")
    coco_average_precision(split.ground_truth, [])
    split[0]


@cache
def cached_rows() -> tuple[tempfile.TemporaryDirectory, Path, bytes]:
    """A folder with a data set, the file of its rows in the cache, and what that holds."""
    place = tempfile.TemporaryDirectory()
    folder = Path(place.name)
    (folder / "a.json").write_text(json.dumps(COCO))
    (folder / "1.png").write_bytes(image_bytes())
    load_coco_split(folder / "a.json", folder, cache_dir=folder / "cache")
    (file,) = (folder / "cache").glob("*.arrow")
    return place, file, file.read_bytes()


def read_cached_rows(content: bytes, folder: Path) -> None:
    """Of the same data set each time: its rows have absolute paths."""
    _, file, _ = cached_rows()
    file.write_bytes(content)
    home = file.parents[1]
    split = load_coco_split(home / "a.json", home, cache_dir=file.parent)
    split[0]


@cache
def checkpoint_files() -> dict[str, bytes]:
    """Of a tiny detector: its files by name, as a run's sealed checkpoint has them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint-1"
        tiny_model().save_pretrained(folder)
        load_image_processor(None, 64, 64).save_pretrained(folder)
        for state in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"step": torch.zeros(3)}, folder / state)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "best_model_checkpoint": None}))
        seal(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_model(folder: Path) -> None:
    """As a student to go on from and as a teacher."""
    load_teacher(str(folder))


def head_of(weights: bytes) -> bytes:
    """What safetensors say of their tensors, before the numbers."""
    return weights[: 8 + int.from_bytes(weights[:8], "little")]


def with_checkpoint(name: str, read: Callable[[Path], object]) -> "Reader":
    """A reader of a checkpoint of which this file is damaged; of weights their head."""

    def reader(content: bytes, folder: Path) -> None:
        files = checkpoint_files()
        (folder / "checkpoint-1").mkdir()
        for other, whole in files.items():
            rest = files[name][len(head_of(files[name])) :] if name.endswith(".safetensors") else b""
            (folder / "checkpoint-1" / other).write_bytes(content + rest if other == name else whole)
        read(folder / "checkpoint-1")

    return reader


def go_on_from(checkpoint: Path) -> None:
    """Look for the checkpoint that a run goes on from."""
    newest_whole_checkpoint(checkpoint.parent, with_best=True)


INPUTS = json.dumps({"teacher": asdict(Fingerprint(2, 100, "12", "34", "56"))}).encode()


def read_run_options_of(content: bytes, folder: Path) -> None:
    """Whose folder it is."""
    (folder / "run.yaml").write_bytes(content)
    (folder / "results.json").write_text("{}")
    check_output_folder(folder, "seed: 1\n", {"processes": 1})


def read_inputs_of(content: bytes, folder: Path) -> None:
    """What a run has read."""
    (folder / "inputs.json").write_bytes(content)
    read_inputs(folder)


Reader = Callable[[bytes, Path], None]
# of each kind: what is damaged, what reads it, and how many of a hundred inputs are of it, as some are slow to read
KINDS: dict[str, tuple[Callable[[], bytes], Reader, int]] = {
    "coco": (lambda: json.dumps(COCO).encode(), read_coco_file, 20),
    "yaml": (lambda: CONFIGURATION, read_configuration, 20),
    **{kind: (lambda kind=kind: image_bytes(kind), read_image, 5) for kind in ("png", "jpeg", "gif", "tiff", "webp")},
    "parquet": (parquet_bytes, read_parquet, 1),
    "cached rows": (lambda: cached_rows()[2], read_cached_rows, 5),
    "config.json": (lambda: checkpoint_files()["config.json"], with_checkpoint("config.json", load_model), 10),
    "weights": (
        lambda: head_of(checkpoint_files()["model.safetensors"]),
        with_checkpoint("model.safetensors", load_model),
        5,
    ),
    "processor": (
        lambda: checkpoint_files()["preprocessor_config.json"],
        with_checkpoint("preprocessor_config.json", lambda folder: load_image_processor(str(folder))),
        5,
    ),
    "manifest": (lambda: checkpoint_files()["manifest.json"], with_checkpoint("manifest.json", go_on_from), 3),
    "state": (
        lambda: checkpoint_files()["trainer_state.json"],
        with_checkpoint("trainer_state.json", go_on_from),
        3,
    ),
    "run.yaml": (lambda: b"seed: 1\n", read_run_options_of, 3),
    "inputs.json": (lambda: INPUTS, read_inputs_of, 3),
}


class ReadOutside(BaseException):
    """An input has led outside its folder, or started a program."""


def refuse_outside(event: str, arguments: tuple) -> None:
    """An audit hook."""
    reads = event == "open" and str(arguments[0]).endswith(OUTSIDE) and not arguments[2] & os.O_WRONLY
    if reads or event in PROGRAMS:
        raise ReadOutside(f"{event}: {arguments[0]}")


def outcome(read: Reader, content: bytes) -> str:
    """ "read" or "refused"; every other end raises."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "input"
        folder.mkdir()
        (Path(place) / OUTSIDE).touch()
        try:
            read(content, folder)
        except UserError:
            return "refused"
    return "read"


def fuzz(inputs: int, seed: int, failures: Path | None = None) -> tuple[Counter, dict[str, float]]:
    """How often each kind ended how, and the longest seconds of each.

    An input that ended otherwise is kept in the folder; without one it raises.
    """
    generator = random.Random(seed)
    counts: Counter = Counter()
    longest = dict.fromkeys(KINDS, 0.0)
    for kind, (make, read, share) in KINDS.items():
        whole = make()
        if outcome(read, whole) != "read":
            raise RuntimeError(f"{kind}: the whole input is refused")
        for index in range(max(inputs * share // 100, 1)):
            content = mutated(whole, generator)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            start = time.perf_counter()
            try:
                counts[kind, outcome(read, content)] += 1
            except (Exception, TooLong, ReadOutside) as error:  # whatever it is, it is what is looked for
                if failures is None:
                    raise AssertionError(f"{kind}, input {index}: {content!r}") from error
                counts[kind, type(error).__name__] += 1
                failures.mkdir(exist_ok=True)
                (failures / f"{kind}_{index}".replace(" ", "_")).write_bytes(content)
                (failures / f"{kind}_{index}.txt").write_text(traceback.format_exc())
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            longest[kind] = max(longest[kind], time.perf_counter() - start)
    return counts, longest


def too_long(*_: object) -> None:
    """Ends an input that takes too long."""
    raise TooLong(f"more than {SECONDS} s")


def main() -> None:
    inputs, seed = [*map(int, sys.argv[1:]), *(10_000, 0)[len(sys.argv) - 1 :]]
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, too_long)
    datasets.disable_progress_bars()
    logging.disable(logging.ERROR)
    failures = Path("fuzz_failures")
    shutil.rmtree(failures, ignore_errors=True)
    sys.addaudithook(refuse_outside)
    counts, longest = fuzz(inputs, seed, failures)
    for (kind, end), count in sorted(counts.items()):
        print(f"{kind:<12} {end:<16} {count:>6}  longest {longest[kind]:.1f} s")
    print(f"{sum(counts.values())} inputs, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    sys.exit(failures.exists())


if __name__ == "__main__":
    main()
