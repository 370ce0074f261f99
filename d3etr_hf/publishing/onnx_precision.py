"""An ONNX file in half the bits, or its matrix products in a quarter of them, by onnxruntime's own tools."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from d3etr_hf.errors import OnnxExportError, one_line

FLOAT32, FLOAT16, INT8 = "fp32", "fp16", "int8"
FILES = {FLOAT32: "model.onnx", FLOAT16: "model_fp16.onnx", INT8: "model_int8.onnx"}
# What average precision, in 0..1, may be lost by rounding. Queries that are chosen from proposals may change places
# when they are rounded, so that boxes query by query tell nothing.
MOST_LOST = {FLOAT16: 0.02, INT8: 0.1}
# convolutions in int8 are slow on a CPU, and not every runtime has them
QUANTISED = ["MatMul", "Gemm"]


def convert_precision(source: Path, target: Path, precision: str) -> None:
    """Write an ONNX file anew in another precision; what goes in and comes out stays float32.

    Args:
        source: in float32.
        target: the file to write.
        precision: `fp16`, or `int8`: weights of matrix products, with activations that are rounded as they come.

    Raises:
        OnnxExportError: onnxruntime's converter cannot.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    failures = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, onnx.shape_inference.InferenceError)
    root = logging.getLogger()  # where the quantiser advises to prepare the file first, as the exporter has done
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        if precision == FLOAT16:
            proto = convert_float_to_float16(onnx.load(source), keep_io_types=True)
            target.write_bytes(proto.SerializeToString())
        else:
            quantize_dynamic(source, target, op_types_to_quantize=QUANTISED, weight_type=QuantType.QInt8)
    except failures as error:
        raise OnnxExportError(
            f"onnxruntime {version('onnxruntime')} cannot convert this detector to {precision} ({one_line(error)}): "
            "another version may, or take another precision"
        ) from error
    finally:
        root.setLevel(level)


@contextmanager
def run_errors(path: Path, precision: str) -> Iterator[None]:
    """Within this context a graph that onnxruntime does not run is told as one error.

    Raises:
        OnnxExportError: an operator that is not there in this precision, types that do not fit, and the like.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    failures = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)
    try:
        yield
    except failures as error:
        raise OnnxExportError(
            f"{path}: not written, for onnxruntime {version('onnxruntime')} does not run this detector in {precision} "
            f"({one_line(error)}): another version may, or take another precision"
        ) from error


def refuse_loss(figures: dict, float32: dict, path: Path, precision: str) -> None:
    """Whether a converted file still finds what the detector does.

    Args:
        figures: of the file: its `differences` from PyTorch, and `AP` where it was measured.
        float32: those of the file that it was converted from.
        path: the file, as the error calls it.
        precision: of it.

    Raises:
        OnnxExportError: a score or a box is no number, or more AP is lost than rounding costs.
    """
    for name, group in figures["differences"].items():
        if any(value != value or value == float("inf") for value in group.values()):
            raise OnnxExportError(
                f"{path}: not written, for in {precision} scores or boxes are no numbers ({name.replace('_', ' ')}): "
                "this detector's values are too large for it; take another precision"
            )
    if "AP" in float32 and not figures["AP"] >= float32["AP"] - MOST_LOST[precision]:
        raise OnnxExportError(
            f"{path}: not written, for in {precision} AP is {100 * figures['AP']:.1f}, and in float32 "
            f"{100 * float32['AP']:.1f}, on {figures['AP_images']} images; rounding may cost "
            f"{100 * MOST_LOST[precision]:.0f}: take another precision"
        )
