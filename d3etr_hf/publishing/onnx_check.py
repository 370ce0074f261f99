"""A detector's ONNX file, kept only if onnxruntime computes with it on real images what PyTorch does."""

import os
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from d3etr_hf.configurations import option, read_yaml_file
from d3etr_hf.data import DataArguments, DetectionCollator, DetectionDataset, load_splits
from d3etr_hf.errors import OnnxExportError
from d3etr_hf.evaluation import average_precision_of, select_detections
from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.files import make_folder, sha256_of, write_errors
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.models.loading import load_detector
from d3etr_hf.models.places import refuse_other_place
from d3etr_hf.outputs.boxes import centre_to_corners
from d3etr_hf.publishing.onnx_export import (
    AXES,
    NEEDED,
    OPSET,
    OUTPUTS,
    OnnxDetector,
    describe_for_onnx,
    export_onnx,
    in_words,
    require_packages,
    size_for_export,
)
from d3etr_hf.publishing.onnx_precision import FILES, FLOAT32, convert_precision, refuse_loss, run_errors
from d3etr_hf.publishing.onnx_record import record_check
from d3etr_hf.publishing.run_folder import hash_of_weights, merged_data_arguments
from d3etr_hf.runs.output_folder import CONFIGURATION

logger = logging.get_logger(__name__)

# Float32 rounding comes to some thousandths of these (BCCD: 0.002 pixels and 6e-6); a mask or a layer that was
# converted wrongly is far above. Half a pixel is less than annotators agree on.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3
# Scale, multiple and remainder of the sides that images are checked at too: odd sides are a multiple of no backbone's
# stride, multiples of 64 of every one's.
OTHER_SIZES = ((0.87, 2, 1), (0.71, 2, 1), (0.58, 64, 0))


@dataclass
class ExportArguments:
    """Which detector is exported, and how it is checked."""

    folder: str = field(metadata={"help": "The detector: the output folder of a run, a checkpoint, or a Hub id."})
    output: str | None = option(
        None,
        "The ONNX file; by default model.onnx (model_fp16.onnx, model_int8.onnx) in the folder. A Hub id needs it.",
    )
    check_images: int = option(20, "How many validation images it is compared with PyTorch on.")
    precision: Literal["fp32", "fp16", "int8"] = option(
        FLOAT32,
        "What it computes in: fp16 halves the file, for accelerators; int8 has the weights of matrix products in 8 "
        "bits, for CPUs.",
    )
    ap_images: int | None = option(
        None, "How many validation images its average precision is measured on: by default all; 0 leaves it out."
    )

    def __post_init__(self):
        if self.ap_images is not None and self.ap_images < 0:
            raise ValueError(f"ap_images is {self.ap_images}: it must be at least 0")
        if self.check_images < 1:
            raise ValueError(f"check_images is {self.check_images}: it must be at least 1")


def export_and_check(
    folder: str,
    output: str | None = None,
    check_images: int = 20,
    data_arguments: DataArguments | None = None,
    precision: str = FLOAT32,
    ap_images: int | None = None,
) -> dict:
    """Export a saved detector to ONNX, and keep the file only if onnxruntime computes with it what PyTorch does.

    Compared are `check_images` validation images one by one, some of them at other sizes, and a padded batch; of a
    file for images of one size, images of that size and a batch of them, padded if the family reads padding. A file in
    another precision is made of the one in float32, which is checked first; it may differ by what rounding costs.
    The figures are also kept in `onnx_check.json` beside the file. A failure leaves whatever was there before.

    Args:
        folder: a folder with a checkpoint, or a Hub id.
        output: the file; by default in the folder, by the name that its precision has in `FILES`.
        check_images: the first so many validation images.
        data_arguments: where they are; by default where the folder's run (`run.yaml`) had them.
        precision: `fp32`, `fp16` or `int8`.
        ap_images: AP is measured on the first so many validation images; None for all, 0 for not at all.

    Returns:
        The figures of `OnnxTrial`, and what they were measured with; in `takes`, which images the file is for.

    Raises:
        OnnxExportError: a package is missing, it is not known where the file or the images are, the detector cannot
            be exported, the images would not be of the file's size, or the exported one computes something else.
        DetectorLoadError, DatasetError: the detector or its data cannot be read.
        WriteError: the file cannot be written.
    """
    require_packages()
    refuse_other_place(folder, f"model {folder!r}")
    path = _output_path(folder, output, precision)
    make_folder(path.parent)
    detector = load_detector(folder)
    trial, metadata = _prepare(detector, folder, data_arguments or _data_of_run(Path(folder)), check_images, ap_images)
    figures = _write_checked(trial, path, metadata, precision)
    weights = {"weights": hash_of_weights(Path(folder))} if Path(folder).is_dir() else {}
    weights["onnx"] = sha256_of(path)
    check = {"data": trial.val.name, **weights, "takes": metadata["takes"], "precision": precision, **figures}
    check["opset"], check["megabytes"] = OPSET, round(path.stat().st_size / 1e6, 2)
    check["versions"] = {package: version(package) for package in ("torch", "transformers", *NEEDED)}
    record_check(path, check)
    return check


@dataclass
class OnnxTrial:
    """What an ONNX file is tried on.

    Attributes:
        detector: on the CPU.
        val: the validation split, as the detector sees it.
        size: height and width in pixels of all images that the file takes; None for any.
        check_images, ap_images: as `export_and_check` takes them.
    """

    detector: Detector
    val: DetectionDataset
    size: tuple[int, int] | None
    check_images: int
    ap_images: int | None

    def figures_of(self, path: Path) -> dict:
        """Those of `compare_with_onnx`, and `AP` with `AP_images` where it is asked for, and there are objects of the
        detector's classes."""
        examples = [self.val[index] for index in range(min(self.check_images, len(self.val)))]
        figures = compare_with_onnx(self.detector, path, examples, self.size)
        count = len(self.val) if self.ap_images is None else min(self.ap_images, len(self.val))
        if count and self.val.class_names != self.detector.class_names:
            logger.warning_once(f"{self.val.name} has other classes than the detector: its AP is not measured")
            return figures
        if count == 0 or any(value != value for group in figures["differences"].values() for value in group.values()):
            return figures
        metrics = evaluate_onnx(self.detector, path, self.val.select(range(count)), self.size)
        return figures | ({"AP": metrics["AP"], "AP_images": count} if "AP" in metrics else {})


def _prepare(
    detector: Detector, folder: str, data_arguments: DataArguments, check_images: int, ap_images: int | None
) -> tuple[OnnxTrial, dict[str, str]]:
    """What the detector's file is tried on, and what it tells of itself."""
    processor = image_processor_of(detector.config.model_type, folder)
    size = size_for_export(detector, processor)
    metadata = describe_for_onnx(detector, processor, size)  # first: the data arguments may set another size
    _, val = load_splits(data_arguments, processor, trains=False)
    _refuse_another_size(folder, size, size_for_export(detector, processor))
    return OnnxTrial(detector, val, size, check_images, ap_images), metadata


def _write_checked(trial: OnnxTrial, path: Path, metadata: dict[str, str], precision: str) -> dict:
    """Write the file if it passes; its figures."""
    plain, unfinished = (path.with_name(f"{path.name}{end}.unfinished") for end in (".float32", ""))
    try:
        with write_errors(path):  # before the long work
            plain.touch()
        export_onnx(trial.detector, plain, metadata, trial.size)
        figures = trial.figures_of(plain)
        _refuse_differences(figures, path)
        if precision == FLOAT32:
            plain.replace(path)
            return figures
        convert_precision(plain, unfinished, precision)
        with run_errors(path, precision):
            converted = trial.figures_of(unfinished)
        refuse_loss(converted, figures, path, precision)
        unfinished.replace(path)
        return converted | ({"AP_float32": figures["AP"]} if "AP" in figures else {})
    finally:
        for each in (plain, unfinished):
            each.unlink(missing_ok=True)


@torch.inference_mode()
def compare_with_onnx(
    detector: Detector, path: Path, examples: list[dict], size: tuple[int, int] | None = None
) -> dict:
    """How far an ONNX file is from its detector, query by query, and what each takes, turn by turn.

    Args:
        detector: on the CPU.
        path: the ONNX file.
        examples: of a data set with a `DetectionTransform`.
        size: height and width in pixels of all images that the file takes, smaller ones padded; None for any.

    Returns:
        `differences`, for each of the `groups_of` examples the largest of any query's `box_pixels` (of a corner, in
        pixels of the original image) and `score` (of a class, 0..1);
        `milliseconds` of an image, the medians of `pytorch` and `onnxruntime`; the numbers of `images` and `threads`.
    """
    model, session = OnnxDetector(detector).eval(), _session(path)
    groups = groups_of(examples, size, detector.reads_padding)
    differences = {}
    for name, batches in groups.items():
        found = [_difference(model, session, batch) for batch in batches]
        # NaN must stay NaN, which Python's max would drop
        box, score = torch.tensor(found, dtype=torch.float64).amax(dim=0).tolist()
        differences[name] = {"box_pixels": box, "score": score}
    seconds = {"pytorch": [], "onnxruntime": []}
    for index, batch in enumerate(groups["one_by_one"]):  # the comparison was the warm-up
        calls = {"pytorch": lambda batch=batch: _run_pytorch(model, batch)}
        calls["onnxruntime"] = lambda batch=batch: _run_onnx(session, batch)
        for name in sorted(calls, reverse=index % 2 == 1):
            seconds[name].append(seconds_of(calls[name]))
    return {
        "images": len(examples),
        "differences": differences,
        "milliseconds": {name: 1000 * torch.tensor(times).median().item() for name, times in seconds.items()},
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def evaluate_onnx(
    detector: Detector, path: Path, val: DetectionDataset, size: tuple[int, int] | None = None
) -> dict[str, float]:
    """COCO metrics (0..1) of an ONNX file by onnxruntime, an image at a time.

    Args:
        detector: whose file it is.
        path: the ONNX file.
        val: with the detector's `DetectionTransform`.
        size: as in `compare_with_onnx`.
    """
    session, collate, detections = _session(path), DetectionCollator(), []
    for index in tqdm(range(len(val)), desc=f"average precision of {path.name}", leave=False):
        batch = collate([val[index]])
        batch = batch if size is None else _on_canvas(batch, *size)
        logits, _, boxes = _run_onnx(session, batch)
        sizes = torch.tensor([label["orig_size"] for label in batch["labels"]])
        detections.append(select_detections(detector.scores, logits, boxes, sizes))
    return average_precision_of(torch.cat(detections), val)


def groups_of(
    examples: list[dict], size: tuple[int, int] | None, reads_padding: bool
) -> dict[str, list[dict[str, Any]]]:
    """The batches that are compared.

    Args:
        examples: of a data set.
        size: height and width in pixels of all images, smaller ones padded; None for any.
        reads_padding: whether the detector reads the pixel mask.

    Returns:
        Of `GROUPS`: `one_by_one`, the images as they are; without a size `other_sizes`; `padded_batch` of three or
        four at several sizes, or, where the detector reads no padding, `batch` of three as they are.
    """
    collate, first = DetectionCollator(), list(islice(cycle(examples), 3))
    alone = {"one_by_one": [collate([example]) for example in examples]}
    if size is None:
        others = [_resized(*pair) for pair in zip(first, OTHER_SIZES, strict=True)]
        more = {"other_sizes": [collate([example]) for example in others]}
        return alone | more | {"padded_batch": [collate([examples[0], *others])]}
    smaller = [_resized(*pair) for pair in zip(first[1:], OTHER_SIZES[:2], strict=True)]
    batch = {"padded_batch": [collate([first[0], *smaller])]} if reads_padding else {"batch": [collate(first)]}
    return {name: [_on_canvas(each, *size) for each in batches] for name, batches in (alone | batch).items()}


def _on_canvas(batch: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A batch padded at the right and at the bottom, to this height and width in pixels."""
    more = (0, width - batch["pixel_mask"].shape[2], 0, height - batch["pixel_mask"].shape[1])
    if min(more) < 0:  # PyTorch would cut images off
        raise ValueError(f"images of up to {in_words(batch['pixel_mask'].shape[1:])} for a file of {height} x {width}")
    return batch | {name: nn.functional.pad(batch[name], more) for name in AXES}


def _session(path: Path):
    """The file in onnxruntime, on as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # else its threads wait at full speed after each call, and slow PyTorch down to half
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _output_path(folder: str, output: str | None, precision: str) -> Path:
    if output is None and not Path(folder).is_dir():
        raise OnnxExportError(f"{folder!r} is no folder here: say with --output where its {FILES[precision]} goes")
    if output is not None and os.path.isdir(output):
        raise OnnxExportError(f"--output {output} is a folder: name the file, for example {FILES[precision]} in it")
    return Path(folder) / FILES[precision] if output is None else Path(output)


def _data_of_run(folder: Path) -> DataArguments:
    """Where the run that wrote this folder, or this checkpoint of it, had its data."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for place in places:
        if (place / CONFIGURATION).exists():
            return merged_data_arguments(read_yaml_file(place / CONFIGURATION) or {}, DataArguments())
    raise OnnxExportError(
        f"{folder} holds no {CONFIGURATION} that says where its validation images are, which the export is checked "
        "on: give --data_folder (or another of the data options)"
    )


def _refuse_another_size(folder: str, size: tuple[int, int] | None, of_data: tuple[int, int] | None) -> None:
    """The data options may set another size than that of the image processor, for which alone the file would be."""
    if of_data != size:
        raise OnnxExportError(
            f"{folder}: its file would be for images {in_words(size)}, as its image processor says, and the data "
            f"options make images {in_words(of_data)}: leave the size out of them"
        )


def _resized(example: dict, size: tuple[float, int, int]) -> dict:
    """The same image at another size, see `OTHER_SIZES`."""
    scale, multiple, remainder = size
    pixels = example["pixel_values"]
    sides = [max(1, round(side * scale / multiple)) * multiple + remainder for side in pixels.shape[1:]]
    resized = nn.functional.interpolate(pixels[None], size=sides, mode="bilinear", antialias=True)
    return {**example, "pixel_values": resized[0]}


def _run_pytorch(model: OnnxDetector, batch: dict) -> tuple[torch.Tensor, ...]:
    return model(**{name: batch[name] for name in AXES})


def _run_onnx(session, batch: dict) -> tuple[torch.Tensor, ...]:
    inputs = {name: batch[name].numpy() for name in AXES}
    return tuple(torch.from_numpy(value) for value in session.run(list(OUTPUTS), inputs))


def _difference(model: OnnxDetector, session, batch: dict) -> tuple[float, float]:
    """Largest differences of any query of a batch: of a corner in pixels of the original image, and of a score."""
    sizes = torch.tensor([label["orig_size"] for label in batch["labels"]])
    scale = sizes[:, None, [1, 0, 1, 0]]
    (_, scores, boxes), (_, other_scores, other_boxes) = _run_pytorch(model, batch), _run_onnx(session, batch)
    corners = (centre_to_corners(boxes) - centre_to_corners(other_boxes)) * scale
    return corners.abs().max().item(), (scores - other_scores).abs().max().item()


def _refuse_differences(figures: dict, path: Path) -> None:
    for name, group in figures["differences"].items():
        # `not <=` refuses NaN too
        if not (group["box_pixels"] <= BOX_TOLERANCE and group["score"] <= SCORE_TOLERANCE):
            raise OnnxExportError(
                f"{path}: not written, for it computes something else than PyTorch ({name.replace('_', ' ')}: boxes "
                f"differ by up to {group['box_pixels']:.3g} pixels, scores by {group['score']:.3g}; {BOX_TOLERANCE} "
                f"and {SCORE_TOLERANCE} are allowed): the exporter has a fault, try another version of torch"
            )
