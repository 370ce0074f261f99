"""What a run reads from elsewhere, by content: data, teacher and start model must not change while it is under way."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm
from transformers.utils import cached_file, logging

from d3etr_hf.data import DataArguments, DetectionDataset
from d3etr_hf.data.data_arguments import load_annotated
from d3etr_hf.errors import DamagedFileError, OutputFolderError
from d3etr_hf.files import blocks_of
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.runs.output_folder import INPUTS, REMEDIES, read_record

logger = logging.get_logger(__name__)

# what of a checkpoint decides about a run: its weights, its configuration, how it takes images
OF_CHECKPOINT = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "config.json",
    "preprocessor_config.json",
)
# options of data that change no annotation
OF_PIXELS = {
    "short_side",
    "long_side",
    "image_size",
    "augmentation",
    "augmentation_short_sides",
    "strong_end_fraction",
    "mosaic",
    "mosaic_end_fraction",
    "unlabeled_images",
    "unlabeled_ratio",
}
# contents of up to so many bytes are hashed anyway: it takes a moment
BYTES_HASHED_ANYWAY = 2**28
ROWS = 64  # of embedded images at once


@dataclass(frozen=True)
class Fingerprint:
    """Of some files, or of what else a run reads.

    Attributes:
        count: how many they are.
        bytes: of all of them together.
        sizes: hash of their names and sizes; None of what is not in files of its own.
        times: hash of names, sizes and times of change, by which a later call sees that it need not read them again.
        content: hash of what they hold; None where it was not computed.
    """

    count: int
    bytes: int
    sizes: str | None = None
    times: str | None = None
    content: str | None = None

    def __str__(self) -> str:
        return f"{self.count} of {self.bytes} bytes"


@dataclass(frozen=True)
class Input:
    """Something that a run reads.

    Attributes:
        names: of the files, relative to where they lie, or of what else.
        sizes: of each, bytes.
        times: of change of each, nanoseconds; empty of what is not in files.
        read: gives the content, in blocks.
    """

    names: list[str]
    sizes: list[int]
    read: Callable[[], Iterator[bytes]] = field(repr=False)
    times: list[int] = field(default_factory=list)

    def fingerprint(self, known: Fingerprint | None = None, whole: bool = False) -> Fingerprint:
        """The fingerprint, with the content's hash where that is worth its time.

        Args:
            known: from an earlier call. Its hash of the content is kept where sizes and times are the same.
            whole: hash the content however large it is.
        """
        sizes = _digest(json.dumps([self.names, self.sizes]).encode())
        times = _digest(json.dumps([self.names, self.sizes, self.times]).encode()) if self.times else None
        content = None
        if known is not None and known.sizes == sizes and known.times == times is not None:
            content = known.content
        elif known is not None and known.content is not None:
            whole = True
        if content is None and (whole or sum(self.sizes) <= BYTES_HASHED_ANYWAY):
            content = _digest_of(self.read(), sum(self.sizes))
        return Fingerprint(len(self.names), sum(self.sizes), sizes, times, content)


def same(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether two fingerprints are of the same content, as far as they tell: times do not count."""
    if old.sizes != new.sizes:
        return False
    return None in (old.content, new.content) or old.content == new.content


def files(paths: Iterable[str | Path], folder: str | Path) -> Input:
    """These files as an input; their names are relative to a folder."""
    paths = [os.path.abspath(path) for path in paths]
    states = [os.stat(path) for path in paths]

    def read() -> Iterator[bytes]:
        for path in paths:
            yield from blocks_of(path)

    names = [os.path.relpath(path, os.path.abspath(folder)) for path in paths]
    return Input(names, [state.st_size for state in states], read, [state.st_mtime_ns for state in states])


def images_of(dataset: DetectionDataset) -> Input:
    """The images of a split, in the order of its rows."""
    if "image_path" in dataset.rows.features:
        paths = dataset.rows["image_path"][:]
        return files(paths, os.path.commonpath([os.path.dirname(path) for path in paths]))

    def embedded() -> Iterator[pa.Array]:
        rows = dataset.rows.select_columns(["image"]).with_format("arrow")
        for table in rows.iter(batch_size=ROWS):
            images = table["image"].combine_chunks()
            yield pc.struct_field(images, "bytes"), pc.struct_field(images, "path")

    def read() -> Iterator[bytes]:
        for contents, paths in embedded():
            for content, path in zip(contents, paths, strict=True):
                yield content.as_buffer() if content.is_valid else Path(path.as_py()).read_bytes()

    sizes: list[int] = []
    for contents, paths in embedded():
        lengths = zip(pc.binary_length(contents).to_pylist(), paths.to_pylist(), strict=True)
        sizes += [os.path.getsize(path) if length is None else length for length, path in lengths]
    return Input([str(image_id) for image_id in dataset.rows["image_id"][:]], sizes, read)


def annotations_of(dataset: DetectionDataset) -> Input:
    """The annotations of a split, by the hash that was made when they were read."""
    digest = dataset.annotations_digest.encode()
    return Input([""], [len(digest)], lambda: iter([digest]))


def checkpoint_at(path: str) -> Input:
    """What a folder, or a Hub id as it lies in the cache, holds of a model."""
    folder = Path(cached_file(path, "config.json")).parent
    found = {file for pattern in OF_CHECKPOINT for file in folder.glob(pattern)}
    return files(sorted(found), folder)


def inputs_of(
    model_arguments: ModelArguments,
    teacher_arguments: TeacherArguments,
    train: DetectionDataset,
    val: DetectionDataset,
) -> dict[str, Input]:
    """Everything that a run reads, by what the messages call it."""
    found: dict[str, Input] = {}
    for name, split in (("training", train), ("validation", val)):
        found[f"{name} annotations"] = annotations_of(split)
        found[f"{name} images"] = images_of(split)
    if train.unlabeled is not None:
        found["unlabelled images"] = images_of(train.unlabeled.images)
    places = models_of(model_arguments, teacher_arguments)
    return found | {name: checkpoint_at(path) for name, path in places.items()}


def models_of(model_arguments: ModelArguments, teacher_arguments: TeacherArguments) -> dict[str, str]:
    """Where the checkpoints are that a run reads, by what the messages call them."""
    places = {
        "teacher": teacher_arguments.teacher,
        "model to start from": model_arguments.model,
        "backbone's weights": model_arguments.backbone_weights,
    }
    return {name: path for name, path in places.items() if path is not None}


def read_inputs(output: Path) -> dict[str, Fingerprint]:
    """What a run has read so far, by name; nothing where nobody wrote it down, with a warning.

    Raises:
        DamagedFileError: `inputs.json` cannot be read.
    """
    path = output / INPUTS
    try:
        return {name: Fingerprint(**values) for name, values in read_record(path).items()}
    except FileNotFoundError:
        logger.warning(f"{output} holds no {INPUTS}: whether data and models are those of before is not looked at")
        return {}
    except (AttributeError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged, since it holds no fingerprints: {REMEDIES[INPUTS]}") from error


def identity_of(output: Path) -> dict[str, str]:
    """By name, what tells whether two runs have read the same: twelve digits of a hash.

    It is of the names and sizes of images, whose content is not always hashed, and of the content of all else. Nothing
    where the run has not written down what it read.

    Raises:
        DamagedFileError: `inputs.json` cannot be read.
    """
    read = read_inputs(output) if (output / INPUTS).exists() else {}
    return marks_of(read)


class InputsNow:
    """What runs would read now: annotations, and the models that are there. Each is read once for all runs."""

    def __init__(self) -> None:
        self._annotations: dict[str, dict[str, str]] = {}
        self._models: dict[str, str | None] = {}

    def identity(
        self, model_arguments: ModelArguments, teacher_arguments: TeacherArguments, data_arguments: DataArguments
    ) -> dict[str, str]:
        """As `identity_of`, of a run with these arguments.

        Raises:
            DatasetError: the data cannot be loaded.
        """
        data = repr({name: value for name, value in vars(data_arguments).items() if name not in OF_PIXELS})
        if data not in self._annotations:
            self._annotations[data] = _annotations_now(data_arguments)
        found = dict(self._annotations[data])
        for name, path in models_of(model_arguments, teacher_arguments).items():
            if path not in self._models:
                self._models[path] = _model_now(path)
            if (mark := self._models[path]) is not None:
                found[name] = mark
        return found


def _annotations_now(arguments: DataArguments) -> dict[str, str]:
    splits = zip(("training", "validation"), load_annotated(arguments), strict=True)
    return marks_of({f"{name} annotations": annotations_of(split).fingerprint(whole=True) for name, split in splits})


def _model_now(path: str) -> str | None:
    """None where it is not there: a folder that is gone, or a Hub id whose newest weights nobody has loaded yet."""
    with suppress(OSError):
        found = checkpoint_at(path)
        if any(name.endswith(".safetensors") for name in found.names):
            return marks_of({"model": found.fingerprint(whole=True)})["model"]
    return None


def marks_of(read: Mapping[str, Fingerprint]) -> dict[str, str]:
    """`identity_of` what has these fingerprints."""
    marks = {name: each.sizes if name.endswith("images") else each.content for name, each in read.items()}
    return {name: mark[:12] for name, mark in marks.items() if mark is not None}


def check_inputs(inputs: Mapping[str, Input], known: Mapping[str, Fingerprint], whole: bool = False) -> dict:
    """See that a run which goes on reads what it read before.

    Args:
        inputs: from `inputs_of`.
        known: from `read_inputs`; empty of a run that begins.
        whole: compare the content of images, however much there is.

    Returns:
        What is to be written into `inputs.json`.

    Raises:
        OutputFolderError: something has changed; the message names it, with the way out.
    """
    found = {
        name: each.fingerprint(known.get(name), whole or not name.endswith("images")) for name, each in inputs.items()
    }
    changed = [f"the {name} (read before, not now)" for name in known if name not in found]
    for name, fingerprint in found.items() if known else ():
        if name not in known:
            changed.append(f"the {name} (not read before)")
        elif not same(known[name], fingerprint):
            changed.append(f"the {name} ({_change(known[name], fingerprint)})")
    if changed:
        raise OutputFolderError(
            f"what the run reads has changed since it began: {', '.join(changed)}; put back what was there, or choose "
            "another output_dir to start anew"
        )
    return {name: asdict(fingerprint) for name, fingerprint in found.items()}


def _change(old: Fingerprint, new: Fingerprint) -> str:
    if (old.count, old.bytes) != (new.count, new.bytes):
        return f"files: {old} then, {new} now"
    return "other content" if old.sizes == new.sizes else "other names or sizes"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(blocks: Iterable[bytes], size: int) -> str:
    digest, quick = hashlib.sha256(), size <= BYTES_HASHED_ANYWAY
    with tqdm(total=size, desc="hashing", unit="B", unit_scale=True, disable=quick) as bar:
        for block in blocks:
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
