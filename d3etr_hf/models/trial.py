"""A model of a configuration, tried before it is used: built of nothing, and given one small image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig
from transformers.utils import logging

from d3etr_hf.errors import DetectorLoadError, ImageSizeError, one_line
from d3etr_hf.models.detector import Detector
from d3etr_hf.outputs import OWN

logger = logging.get_logger(__name__)

# no detector comes near: the largest that are public have some thousand modules and half as many parameters
MOST_MODULES, MOST_PARAMETERS = 10_000, 10**9
# of images that are tried, in pixels, until one has a token for each query that is chosen from them
SIDES = (64, 128, 256, 512, 1024)
# the least of them at which a failure is no fault of the image: of 64 pixels a coarse level has a single token, which
# a norm of the stock model may refuse
LARGE_ENOUGH = 256
# what Transformers and PyTorch raise of values that make no model
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RecursionError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextmanager
def build_errors(what: str) -> Iterator[None]:
    """Within this context, what a library says of a configuration that makes no model becomes one error.

    Args:
        what: where the configuration is from, as the error calls it.

    Raises:
        DetectorLoadError: see above.
    """
    try:
        yield
    except DetectorLoadError:
        raise
    except BUILD_ERRORS as error:
        raise DetectorLoadError(
            f"{what}: no model can be built from these values ({type(error).__name__}: {one_line(error, 300)})"
        ) from error


def build_on_meta(build: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig, what: str) -> Any:
    """The model of a configuration without numbers, in no memory; random numbers are left as they are.

    Args:
        build: what makes the model.
        config: the configuration.
        what: where it is from, as the errors call it.

    Raises:
        DetectorLoadError: it cannot be built, or would be of an absurd size.
    """
    with build_errors(what), _size_limit(what), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build(config)


@contextmanager
def _size_limit(what: str) -> Iterator[None]:
    """Building ends when a model has become too large, however it says so: in its layers, widths, or lists of them."""
    counts = {"modules": 0, "parameters": 0}

    def count(kind: str, number: int, most: int) -> None:
        counts[kind] += number
        if counts[kind] > most:
            raise DetectorLoadError(
                f"{what}: its values make a model of more than {most:,} {kind}, which no detector has: correct its "
                "layers and widths"
            )

    handles = [
        register_module_module_registration_hook(lambda *_: count("modules", 1, MOST_MODULES)),
        register_module_parameter_registration_hook(
            lambda module, name, value: None if value is None else count("parameters", value.numel(), MOST_PARAMETERS)
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def try_detector(model: Detector, what: str) -> None:
    """Give a detector one small image: values that fit nothing but build are found before anything long.

    The model and the random numbers are left as they are. What takes no image of up to 1024 pixels a side stays
    untried, with a warning.

    Args:
        model: a detector with its weights.
        what: where it is from, as the errors call it.

    Raises:
        DetectorLoadError: its forward pass fails, or predicts nothing, or what is not finite.
    """
    training = model.training
    try:
        with build_errors(what), torch.random.fork_rng(devices=[]), torch.no_grad():
            model.criterion()
            own = _predictions(model.eval(), what)
    finally:
        model.train(training)
    if own is not None and not own.logits.shape[2]:
        raise DetectorLoadError(f"{what}: its values make a model without queries, which predicts nothing")
    if own is not None and not (torch.isfinite(own.logits).all() and torch.isfinite(own.boxes).all()):
        raise DetectorLoadError(
            f"{what}: what it predicts of an image of noise is not finite, with weights that are: correct its "
            "configuration"
        )


def _predictions(model: Detector, what: str) -> Any:
    """Of the smallest image that the model takes; None of one that takes none of these sizes."""
    for height, width in _sizes(model):
        pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        try:
            model.check_image(height, width)
            return model.try_image(pixels.to(model.device, model.dtype)).groups[OWN]
        except ImageSizeError:
            continue
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            if max(height, width) >= LARGE_ENOUGH or model.only_size is not None:
                raise
    logger.warning(
        f"{what}: not tried before it is used, since it takes no image of up to {SIDES[-1]} pixels a side: its "
        "configuration may be wrong"
    )
    return None


def _sizes(model: Detector) -> list[tuple[int, int]]:
    """Heights and widths, pixels, that it may take."""
    if model.only_size is not None:
        return [model.only_size] if max(model.only_size) <= SIDES[-1] else []
    divisor = model.side_divisor
    sides = [int(-(-least // divisor) * divisor) for least in SIDES]
    return list(zip(sides, sides, strict=True))
