"""A detector as one ONNX file for images of any size."""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

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
UNTRACEABLE_BACKBONES = ("swin", "swinv2", "maskformer-swin", "focalnet", "dinat")


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


def export_onnx(detector: Detector, path: Path, metadata: dict[str, str]) -> None:
    """Write a detector as one ONNX file, unchecked; inputs and outputs are those of `OnnxDetector`, of any sizes.

    Args:
        detector: on the CPU.
        path: the file.
        metadata: kept in the file as its properties.

    Raises:
        OnnxExportError: a package is missing, the detector is too large for one file, or cannot be traced with free
            sizes.
    """
    require_packages()
    size = sum(parameter.numel() * parameter.element_size() for parameter in detector.parameters())
    if size >= MOST_BYTES:
        raise OnnxExportError(f"{size / 1e9:.1f} GB of weights do not fit into one ONNX file, which holds 2 GB")
    backbone = detector.backbone_type
    if backbone in UNTRACEABLE_BACKBONES:
        raise OnnxExportError(
            f"a detector with a {backbone!r} backbone cannot be exported for images of any size: its padding is "
            "decided in Python; ResNet and ConvNext backbones can"
        )
    import onnx

    try:
        proto = _traced(detector)
        onnx.checker.check_model(proto)  # onnxruntime is more lenient than others
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise OnnxExportError(
            f"torch {torch.__version__} and onnxscript {version('onnxscript')} cannot export this detector (backbone "
            f"{backbone!r}) for images of any size: {str(error).strip().splitlines()[0]}; newer versions may"
        ) from error
    # The exporter notes where each node comes from, with the paths of this machine: no one else's business.
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def _traced(detector: Detector):
    """The detector as an ONNX `ModelProto`."""
    # Sides that are a multiple of nothing, and padding: what depends on the size must not look constant.
    example = {"pixel_values": torch.randn(2, 3, 107, 139), "pixel_mask": torch.ones(2, 107, 139, dtype=torch.int64)}
    example["pixel_mask"][1, 70:] = 0
    with _quiet():
        # torch.export and not TorchScript, which is deprecated and takes a branch that depends on the size for
        # good, in silence. Called here and not by torch.onnx.export, which on a failure tries for minutes more.
        program = torch.export.export(
            OnnxDetector(detector).eval(),
            (),
            example,
            dynamic_shapes={name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in AXES.items()},
            strict=False,
        )
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(AXES),
            output_names=list(OUTPUTS),
            dynamic_shapes=AXES,
            verbose=False,
        ).model_proto


def describe_for_onnx(detector: Detector, processor: BaseImageProcessor) -> dict[str, str]:
    """What an image goes through and what the outputs mean, as JSON texts: `id2label`, `image_processor`."""
    options = processor.to_dict()
    return {
        "id2label": json.dumps(dict(enumerate(detector.class_names))),
        "image_processor": json.dumps({key: options[key] for key in PROCESSOR_KEYS}),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's news about torchvision, axis names and its own deprecations."""
    news = logging.getLogger("torch.onnx")
    level = news.level
    news.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        news.setLevel(level)


def require_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxExportError(f"an export needs {', '.join(missing)}: pip install 'd3etr_hf[onnx]'")
