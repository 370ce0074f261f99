"""A detector's ONNX file, kept only if onnxruntime computes with it on real images what PyTorch does."""

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d3etr_hf.configurations import option, read_yaml_file
from d3etr_hf.data import DataArguments, DetectionCollator, load_splits
from d3etr_hf.errors import OnnxExportError
from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.files import write_json
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.models.loading import load_detector
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
from d3etr_hf.publishing.run_folder import hash_of_weights, merged_data_arguments
from d3etr_hf.runs.output_folder import CONFIGURATION

MODEL, CHECK = "model.onnx", "onnx_check.json"
# Float32 rounding comes to some thousandths of these (BCCD: 0.002 pixels and 6e-6); a mask or a layer that was
# converted wrongly is far above. Half a pixel is less than annotators agree on.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3
# Scale, multiple and remainder of the sides that images are checked at too: odd sides are a multiple of no backbone's
# stride, multiples of 64 of every one's.
OTHER_SIZES = ((0.87, 2, 1), (0.71, 2, 1), (0.58, 64, 0))
# the groups of images that are compared, as `check_in_words` tells of them
GROUPS = {
    "one_by_one": "alone",
    "other_sizes": "at other sizes",
    "padded_batch": "as a padded batch",
    "batch": "as a batch",
}


@dataclass
class ExportArguments:
    """Which detector is exported, and how it is checked."""

    folder: str = field(metadata={"help": "The detector: the output folder of a run, a checkpoint, or a Hub id."})
    output: str | None = option(None, "The ONNX file; by default model.onnx in the folder. A Hub id needs it.")
    check_images: int = option(20, "How many validation images it is compared with PyTorch on.")

    def __post_init__(self):
        if self.check_images < 1:
            raise ValueError(f"check_images is {self.check_images}: it must be at least 1")


def export_and_check(
    folder: str, output: str | None = None, check_images: int = 20, data_arguments: DataArguments | None = None
) -> dict:
    """Export a saved detector to ONNX, and keep the file only if onnxruntime computes with it what PyTorch does.

    Compared are `check_images` validation images one by one, some of them at other sizes, and a padded batch; of a
    file for images of one size, images of that size and a batch of them, padded if the family reads padding. The
    figures are also written to `onnx_check.json` beside the file. A failure leaves whatever was there before.

    Args:
        folder: a folder with a checkpoint, or a Hub id.
        output: the file; by default `model.onnx` in the folder.
        check_images: the first so many validation images.
        data_arguments: where they are; by default where the folder's run (`run.yaml`) had them.

    Returns:
        The figures of `compare_with_onnx`, and what they were measured with; in `takes`, which images the file is for.

    Raises:
        OnnxExportError: a package is missing, it is not known where the file or the images are, the detector cannot
            be exported, the images would not be of the file's size, or the exported one computes something else.
        DetectorLoadError, DatasetError: the detector or its data cannot be read.
    """
    require_packages()
    path = _output_path(folder, output)
    data_arguments = data_arguments or _data_of_run(Path(folder))
    detector = load_detector(folder)
    processor = image_processor_of(detector.config.model_type, folder)
    size = size_for_export(detector, processor)
    metadata = describe_for_onnx(detector, processor, size)  # first: the data arguments may set another size
    _, val = load_splits(data_arguments, processor, trains=False)
    examples = [val[index] for index in range(min(check_images, len(val)))]
    _refuse_another_size(folder, size, size_for_export(detector, processor))

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        export_onnx(detector, unfinished, metadata, size)
        figures = compare_with_onnx(detector, unfinished, examples, size)
        _refuse_differences(figures, path)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    weights = {"weights": hash_of_weights(Path(folder))} if Path(folder).is_dir() else {}
    weights["onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
    check = {"data": val.name, **weights, "takes": metadata["takes"], **figures, "opset": OPSET}
    check["megabytes"] = round(path.stat().st_size / 1e6, 2)
    check["versions"] = {package: version(package) for package in ("torch", "transformers", *NEEDED)}
    write_json(path.with_name(CHECK), check)
    return check


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


def check_in_words(check: dict) -> str:
    """One sentence about `export_and_check`, for a report or a card."""
    box, score = (max(group[key] for group in check["differences"].values()) for key in ("box_pixels", "score"))
    times = check["milliseconds"]
    *groups, last = (words for name, words in GROUPS.items() if name in check["differences"])
    compared = f"{', '.join(groups)} and {last}" if groups else last
    return (
        f"On {check['images']} images of {check['data']}, {compared}, boxes differ "
        f"from PyTorch's by at most {box:.2g} pixels and scores by {score:.2g}; an image takes "
        f"{times['onnxruntime']:.1f} ms, with PyTorch {times['pytorch']:.1f} ms (CPU, {check['threads']} threads)."
    )


def onnx_snippet(repo_id: str | None = None) -> str:
    """Python that detects objects with onnxruntime and the image processor.

    Args:
        repo_id: where the model is on the Hub; None reads it from the current folder.
    """
    if repo_id is None:
        return SNIPPET.format(hub="", path='"model.onnx"', model_id=".")
    hub = "from huggingface_hub import hf_hub_download\n"
    return SNIPPET.format(hub=hub, path=f'hf_hub_download("{repo_id}", "model.onnx")', model_id=repo_id)


SNIPPET = """\
import json
import numpy as np
import onnxruntime
{hub}from PIL import Image
from transformers import AutoImageProcessor

session = onnxruntime.InferenceSession({path})
processor = AutoImageProcessor.from_pretrained("{model_id}", backend="pil")
metadata = session.get_modelmeta().custom_metadata_map
names, padding = json.loads(metadata["id2label"]), json.loads(metadata["padding"])

image = Image.open("photograph.jpg").convert("RGB")
inputs = dict(processor(images=image, return_tensors="np", **padding))
inputs.setdefault("pixel_mask", np.ones_like(inputs["pixel_values"][:, 0], dtype=np.int64))
scores, boxes = session.run(["scores", "pred_boxes"], inputs)
for query, label in np.argwhere(scores[0] > 0.4):
    x, y, width, height = boxes[0, query] * [*image.size, *image.size]
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    print(names[str(label)], f"{{scores[0, query, label]:.2f}}", np.round(corners, 1).tolist())
"""


def _output_path(folder: str, output: str | None) -> Path:
    if output is None and not Path(folder).is_dir():
        raise OnnxExportError(f"{folder!r} is no folder here: say with --output where its {MODEL} goes")
    return Path(folder) / MODEL if output is None else Path(output)


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
