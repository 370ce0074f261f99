"""What a teacher says of images that stay as they are, kept on disk: it sees each of them once, not every epoch."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset
from transformers.utils import logging

from d3etr_hf.data import DetectionCollator, DetectionDataset, DetectionTransform
from d3etr_hf.errors import DamagedFileError, UnsupportedOptionError, WriteError, one_line, quoted
from d3etr_hf.files import UNFINISHED, write_errors
from d3etr_hf.outputs import AttentionMap, GroupRequest
from d3etr_hf.training.processes import on_main_process
from d3etr_hf.training.teacher import Teacher, TeacherOutput, teacher_pixels

GIB = 2**30
MOST_LOOKED_UP = 64  # images that tell how many of a data set are there
# tensors of a `TeacherOutput` by their last name: of all layers, with images on the second axis; and of no image
LAYERS_FIRST = ("probabilities", "boxes", "box_distribution")
OF_NO_IMAGE = ("box_bins",)

logger = logging.get_logger(__name__)


class TeacherCache:
    """Asks a teacher for each image alone, unpadded, and keeps what it says in a file named after the image's pixels.

    What comes of a file is what the teacher would say of that image alone, to the last bit. A batch is put together
    of its images; where their sizes differ, dense attention stands on a common grid, which is not the student's
    (`TeacherOutput.on_memory`). Files are whole or not there, and several processes may share a folder.

    Args:
        teacher: whose outputs are kept.
        folder: made where it is not there; each teacher, request and precision has a folder of its own in it.
        request: which maps to keep; no further groups.
        autocast: makes the context of mixed precision.
        precision: the name of it.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        request: GroupRequest,
        autocast: Callable[[], AbstractContextManager],
        precision: str = "no",
    ):
        self.teacher, self.request, self.autocast = teacher, request, autocast
        self.folder = Path(folder) / _digest_of_teacher(teacher, request, precision)
        self._form: TeacherOutput | None = None  # what files are read into

    def prepare(self, dataset: DetectionDataset) -> None:
        """Ask the teacher once, and say what all images of a data set will take on the disk; all processes call this.

        Raises:
            UnsupportedOptionError: its images do not stay as they are.
            WriteError: the disk has no room for that, or the folder cannot be made.
        """
        transform = dataset.transform
        if not isinstance(transform, DetectionTransform) or transform.augmentation is not None:
            raise UnsupportedOptionError(
                "teacher_cache: images that augmentation changes are other ones every epoch, and nothing can be kept "
                "of them: set augmentation to none, or leave teacher_cache out"
            )
        if dataset.mosaic is not None:
            raise UnsupportedOptionError(
                "teacher_cache: mosaics are other images every epoch, and nothing can be kept of them: set mosaic to "
                "0 (in Python the data set's `mosaic` to None), or leave teacher_cache out"
            )
        ((_, image),) = _images_of(teacher_pixels(DetectionCollator()([dataset[0]])))
        output = self._ask(image.to(self.teacher.detector.device))
        tensors = dict(_named_tensors(output))
        on_main_process(lambda: self._announce(dataset, sum(value.nbytes for value in tensors.values())))

    def _announce(self, dataset: DetectionDataset, bytes_each: int) -> None:
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        images, there = dataset.trained_images, self._share_there(dataset)
        needed, free = round(images * (1 - there)) * bytes_each, shutil.disk_usage(self.folder).free
        if needed > free:
            raise WriteError(
                f"{self.folder.parent}: the teacher's outputs of {images} images take about {needed / GIB:.1f} GiB "
                f"more ({bytes_each / 2**20:.1f} MiB each, by the first), and {free / GIB:.1f} GiB are free: name "
                "another teacher_cache, or leave it out"
            )
        logger.warning(
            f"the teacher's outputs are kept in {self.folder}: about {there:.0%} of {images} images are there, and "
            f"all take about {images * bytes_each / GIB:.2f} GiB"
        )

    def _share_there(self, dataset: DetectionDataset) -> float:
        """About how much of a data set is there already, 0..1, by some of its images: other data may be there, too."""
        if not any(self.folder.glob("*/*.safetensors")):
            return 0.0
        images = dataset if dataset.unlabeled is None else ConcatDataset([dataset, dataset.unlabeled.images])
        looked_at = range(0, dataset.trained_images, max(1, dataset.trained_images // MOST_LOOKED_UP))
        pixels = (teacher_pixels(DetectionCollator()([images[index]])) for index in looked_at)
        found = [self._path_of(name).exists() for each in pixels for name, _ in _images_of(each)]
        return sum(found) / len(found)

    def _path_of(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def __call__(self, pixels: Mapping[str, torch.Tensor]) -> TeacherOutput:
        """What the teacher says of a batch, of files or else of itself.

        Args:
            pixels: `pixel_values` `(B, 3, H, W)` and `pixel_mask` `(B, H, W)`.

        Raises:
            WriteError: a file cannot be written, as on a full disk.
            DamagedFileError: a file cannot be read.
        """
        return self._joined([self._of_image(name, image) for name, image in _images_of(pixels)])

    def _of_image(self, name: str, image: torch.Tensor) -> TeacherOutput:
        path = self._path_of(name)
        if self._form is not None and path.exists():
            return _in_form(self._form, _read(path, image.device, self._form))
        output = self._ask(image)
        # a name of its own: another process may be at the same image
        unfinished = path.with_name(f"{path.stem}.{uuid.uuid4().hex}{UNFINISHED}")
        with write_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # copies: a file takes no tensor that shares its memory with another
                save_file({n: value.cpu().clone().contiguous() for n, value in _named_tensors(output)}, unfinished)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        return output

    def _ask(self, image: torch.Tensor) -> TeacherOutput:
        mask = torch.ones(1, *image.shape[1:], dtype=torch.int64, device=image.device)
        output = self.teacher({"pixel_values": image[None], "pixel_mask": mask}, self.request, self.autocast)
        if self.teacher.queries() is not None:  # they are of no image
            output = replace(output, queries=None)
        self._form = output
        return output

    def _joined(self, outputs: list[TeacherOutput]) -> TeacherOutput:
        uneven = len({None if output.memory_mask is None else output.memory_mask.shape for output in outputs}) > 1
        joined = _joined(_on_common_grid(outputs) if uneven else outputs)
        queries = self.teacher.queries()
        return replace(joined, own_grid=uneven, queries=joined.queries if queries is None else queries)


def _digest_of_teacher(teacher: Teacher, request: GroupRequest, precision: str) -> str:
    """Changes with everything but the pixels that decides about what a teacher says, to the last bit."""
    detector = teacher.detector
    state = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
    elsewhere = ("_name_or_path", "transformers_version")  # a copy of it is the same
    described = {
        "config": {n: value for n, value in detector.config.to_dict().items() if n not in elsewhere},
        "tensors": {name: [str(value.dtype), list(value.shape)] for name, value in state.items()},
        "classes": teacher.class_index.tolist(),
        "layers": teacher.layer_map,
        "maps": [request.self_attention, request.cross_attention],
        "precision": [precision, detector.device.type],
        "versions": [torch.__version__, transformers.__version__, version("d3etr_hf")],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for value in state.values():
        digest.update(_bytes_of(value))
    return digest.hexdigest()[:32]


def _images_of(pixels: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each image `(3, H, W)` without its padding, and a hash of it."""
    values, mask = pixels["pixel_values"], pixels["pixel_mask"].bool()
    sizes = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1).tolist()
    for image, (height, width) in zip(values, sizes, strict=True):
        image = image[:, :height, :width].contiguous()
        digest = hashlib.sha256(json.dumps([str(image.dtype), list(image.shape)]).encode())
        digest.update(_bytes_of(image.cpu()))
        yield digest.hexdigest(), image


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(path: Path, device: torch.device, form: TeacherOutput) -> dict[str, torch.Tensor]:
    """The tensors of a file, which must be those that this teacher gives."""
    remedy = "remove it, and the teacher is asked again"
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{path} cannot be read ({one_line(error)}): {remedy}") from error
    expected, found = (
        {name: (value.dtype, value.ndim) for name, value in named} for named in (_named_tensors(form), tensors.items())
    )
    if found != expected:
        name = min(name for name, _ in expected.items() ^ found.items())
        raise DamagedFileError(f"{path} holds other tensors than this teacher's outputs, as {quoted(name)}: {remedy}")
    return tensors


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of outputs within each other by their place, as `group.cross_attention.0.log`."""
    if torch.is_tensor(value):
        yield name, value
    for part, inner in _parts(value):
        yield from _named_tensors(inner, f"{name}.{part}" if name else part)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple):
        return list(zip(getattr(value, "_fields", map(str, range(len(value)))), value, strict=True))
    return []


def _rebuilt(form: Any, parts: list) -> Any:
    """An output like another, of other parts."""
    return type(form)(*parts) if is_dataclass(form) or hasattr(form, "_fields") else tuple(parts)


def _in_form(form: Any, tensors: dict[str, torch.Tensor], name: str = "") -> Any:
    """An output like another, with the tensors of `_named_tensors`."""
    if torch.is_tensor(form):
        return tensors[name]
    parts = _parts(form)
    if not parts:
        return form
    return _rebuilt(form, [_in_form(inner, tensors, f"{name}.{part}" if name else part) for part, inner in parts])


def _joined(values: list, name: str = "") -> Any:
    """One output of several images' outputs."""
    form = values[0]
    if torch.is_tensor(form):
        return form if name in OF_NO_IMAGE else torch.cat(values, dim=int(name in LAYERS_FIRST))
    parts = [_parts(value) for value in values]
    if not parts[0]:
        return form
    return _rebuilt(form, [_joined([inner for _, inner in same], same[0][0]) for same in zip(*parts, strict=True)])


def _on_common_grid(outputs: list[TeacherOutput]) -> list[TeacherOutput]:
    """Memories of several sizes padded at the right and the bottom, with their dense maps."""
    height, width = (max(output.memory_mask.shape[side] for output in outputs) for side in (1, 2))

    def padded(values: torch.Tensor, mask: torch.Tensor, filling: float) -> torch.Tensor:
        more = (0, width - mask.shape[2], 0, height - mask.shape[1])
        return torch.nn.functional.pad(values, more, value=filling)

    def with_maps(output: TeacherOutput) -> TeacherOutput:
        mask, maps, grid = output.memory_mask, output.group.cross_attention, output.memory_mask.shape[1:]
        if maps is not None and isinstance(maps[0], AttentionMap):
            maps = tuple(
                AttentionMap(
                    padded(layer.log.unflatten(-1, grid), mask, torch.finfo(layer.log.dtype).min).flatten(-2),
                    padded(layer.probability.unflatten(-1, grid), mask, 0.0).flatten(-2),
                )
                for layer in maps
            )
        group = replace(output.group, cross_attention=maps)
        return replace(output, group=group, memory_mask=padded(mask, mask, False))

    return [with_maps(output) for output in outputs]
