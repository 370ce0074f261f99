"""A detector as one ONNX file, for images of any size or, where its family cannot be traced so, of one."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data.image_sizes import size_of, takes_fixed_size
from d3etr_hf.errors import OnnxExportError
from d3etr_hf.models.detector import Detector

# What torch's exporter writes its operators in: a higher one converts them for runtimes that are newer (onnxruntime
# has known 18 since 2023), a lower one is converted down, which may fail.
OPSET = 18
# Of protobuf, which an ONNX file is; beyond it the weights would have to lie in a second file.
MOST_BYTES = 2**31
AXES = {
    "pixel_values": {0: "batch", 2: "height", 3: "width"},
    "pixel_mask": {0: "batch", 1: "height", 2: "width"},
}
OUTPUTS = ("logits", "scores", "pred_boxes")
NEEDED = ("onnx", "onnxruntime", "onnxscript")
PROCESSOR_KEYS = ("size", "do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor", "resample")
# Their padding depends on the size by Python's `if`. With Swin torch.export searches for minutes and fails, and
# TorchScript's exporter keeps the example's branch in silence: at some sizes logits are off by 0.15.
UNTRACEABLE_AT_ANY_SIZE = ("swin", "swinv2", "maskformer-swin", "focalnet", "dinat")
# Transformers' own switch: its assertions about tensors have no operator in ONNX.
NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


class OnnxDetector(nn.Module):
    """A detector as it is exported: what detections are made of, and nothing else.

    Takes `pixel_values` (B, 3, height, width) float32 and `pixel_mask` (B, height, width) int64, one where there is an
    image. Gives the values named in `OUTPUTS`: `logits` as the stock model does; `scores` (B, queries, classes) in
    0..1, zero for a class that its query does not count for; `pred_boxes` (B, queries, 4) cxcywh in 0..1.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.model, self.reading = detector.to_stock(), detector.criterion().scores

    def forward(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        counts = self.reading.ranking(outputs.logits) > -torch.inf
        return outputs.logits, self.reading.probabilities(outputs.logits) * counts, outputs.pred_boxes


def size_for_export(detector: Detector, processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Height and width in pixels of all images that an exported detector takes; None for any.

    Where the family leaves no side free they are what its image processor makes. Of one that keeps an image's
    proportions it is the square that holds them all, whether landscape or upright: smaller ones are padded.

    Raises:
        OnnxExportError: there is no such size, or the detector takes no image of it.
    """
    if detector.exports_any_size:
        return None
    size = size_of(processor)
    height, width = size.height, size.width
    if not takes_fixed_size(processor):
        if size.longest_edge is None:
            raise OnnxExportError(
                f"{detector.title} is exported for images of one size, and its image processor bounds no long side: "
                "set longest_edge in its preprocessor_config.json"
            )
        height = width = math.ceil(size.longest_edge / detector.side_divisor) * detector.side_divisor
    try:
        detector.check_image(height, width)
    except ValueError as error:
        raise OnnxExportError(
            f"{detector.title} cannot be exported for the size of its image processor, which its "
            f"preprocessor_config.json says: {error}"
        ) from error
    return height, width


def export_onnx(detector: Detector, path: Path, metadata: dict[str, str], size: tuple[int, int] | None = None) -> None:
    """Write a detector as one ONNX file, unchecked; inputs and outputs are those of `OnnxDetector`.

    Args:
        detector: on the CPU.
        path: the file.
        metadata: kept in the file as its properties.
        size: height and width in pixels of all images, as `size_for_export` has them; None for any. Batches are of
            any number.

    Raises:
        OnnxExportError: a package is missing, the detector is too large for one file, or cannot be traced.
    """
    require_packages()
    _refuse_untraceable(detector, size)
    import onnx

    try:
        proto = _traced(detector, size)
        onnx.checker.check_model(proto)  # onnxruntime is more lenient than others
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise OnnxExportError(
            f"torch {torch.__version__} and onnxscript {version('onnxscript')} cannot export this {detector.title} "
            f"(backbone {detector.backbone_type!r}) for images {in_words(size)}: "
            f"{str(error).strip().splitlines()[0]}; newer versions may"
        ) from error
    # The exporter notes where each node comes from, with the paths of this machine: no one else's business.
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def in_words(size: tuple[int, int] | None) -> str:
    """Which images a file takes, after the word "images"."""
    return "of any size" if size is None else f"of {size[1]} × {size[0]} pixels"


def _refuse_untraceable(detector: Detector, size: tuple[int, int] | None) -> None:
    """By name, what is known to fail: before minutes of tracing."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in detector.parameters())
    if weights >= MOST_BYTES:
        raise OnnxExportError(f"{weights / 1e9:.1f} GB of weights do not fit into one ONNX file, which holds 2 GB")
    if size is not None:
        return
    if not detector.exports_any_size:
        raise OnnxExportError(f"{detector.title} cannot be exported for images of any size: say of which")
    backbone = detector.backbone_type
    if backbone in UNTRACEABLE_AT_ANY_SIZE:
        raise OnnxExportError(
            f"a detector with a {backbone!r} backbone cannot be exported for images of any size: its padding is "
            "decided in Python; ResNet and ConvNext backbones can"
        )


def _traced(detector: Detector, size: tuple[int, int] | None):
    """The detector as an ONNX `ModelProto`."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    # Sides that are a multiple of nothing, and padding: what depends on the size must not look constant.
    height, width = (107, 139) if size is None else size
    mask = torch.ones(2, height, width, dtype=torch.int64)
    mask[1, height * 2 // 3 :] = 0
    free = {name: {axis: at for axis, at in axes.items() if size is None or axis == 0} for name, axes in AXES.items()}
    with _quiet(), patch.dict(os.environ, {NO_CHECKS: "1"}):
        # torch.export and not TorchScript, which is deprecated and takes a branch that depends on the size for
        # good, in silence. Called here and not by torch.onnx.export, which on a failure tries for minutes more.
        program = torch.export.export(
            OnnxDetector(detector).eval(),
            (),
            {"pixel_values": torch.randn(2, 3, height, width), "pixel_mask": mask},
            dynamic_shapes={name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in free.items()},
            # Reading bytecode, it keeps a batch free of which Python's len() is taken; it takes twice the time.
            strict=not detector.exports_any_size,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(AXES),
            output_names=list(OUTPUTS),
            dynamic_shapes=free,
            verbose=False,
            optimize=False,
        )
        # onnxscript's optimizer calls the bounds of two clamps of one value by one name, and loses both
        # (microsoft/onnxscript, rule FuseMaxMinToClip): let there be one clamp.
        CommonSubexpressionEliminationPass()(exported.model)
        exported.optimize()
        return exported.model_proto


def describe_for_onnx(
    detector: Detector, processor: BaseImageProcessor, size: tuple[int, int] | None = None
) -> dict[str, str]:
    """What an image goes through and what the outputs mean, as JSON texts, and in words which images the file `takes`.

    Args:
        size: as `export_onnx` takes it.

    Returns:
        `id2label`; `image_processor`, its settings; `padding`, what it must be called with beside the images (nothing,
        or to pad them to one size); with a size `image_size`, the `height` and `width` in pixels.
    """
    options = processor.to_dict()
    padding: dict = {}
    sides = {} if size is None else {"image_size": {"height": size[0], "width": size[1]}}
    if size is not None and not takes_fixed_size(processor):
        padding = {"do_pad": True, "pad_size": sides["image_size"]}
    described = {
        "id2label": dict(enumerate(detector.class_names)),
        "image_processor": {key: options[key] for key in PROCESSOR_KEYS},
        "padding": padding,
        **sides,
    }
    takes = f"images padded to {in_words(size).removeprefix('of ')}" if padding else f"images {in_words(size)}"
    return {key: json.dumps(value) for key, value in described.items()} | {"takes": takes}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's news about torchvision, axis names and its own deprecations."""
    news = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in news]
    for logger in news:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(news, levels, strict=True):
            logger.setLevel(level)


def require_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxExportError(f"an export needs {', '.join(missing)}: pip install 'd3etr_hf[onnx]'")
