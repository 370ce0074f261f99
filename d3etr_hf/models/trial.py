"""A model of a configuration, tried before it is used: built of nothing, and given one small image."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig
from transformers.utils import logging

from d3etr_hf.errors import DetectorLoadError, ImageSizeError, UserError, one_line
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
# what Transformers and PyTorch raise of values that make no model, or of a package that a backbone needs
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
# and of a configuration's fields, which it takes for what they are not
FIELD_ERRORS = (*BUILD_ERRORS, AttributeError)
# and of files that cannot be read, or are not there
READ_ERRORS = (*FIELD_ERRORS, EOFError, OSError, SafetensorError, UnpicklingError)


@contextmanager
def library_errors(problem: str, remedy: str = "", kinds: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """Within this context, what a library says becomes one error.

    Errors that say what to do, and a lack of memory, stay as they are.

    Args:
        problem: what it could not do, and with what.
        remedy: what to do, as the error says it after the library's words.
        kinds: what is expected of the library.

    Raises:
        DetectorLoadError: see above.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        said = f"{problem} ({type(error).__name__}: {one_line(error, 300)})"
        raise DetectorLoadError(f"{said}; {remedy}" if remedy else said) from error


def build_errors(what: str, kinds: tuple[type[Exception], ...] = BUILD_ERRORS) -> AbstractContextManager[None]:
    """`library_errors` of a configuration that makes no model.

    Args:
        what: where the configuration is from, as the error calls it.
        kinds: what is expected of the library, or of a family's own check.
    """
    return library_errors(f"{what}: no model can be built from these values", kinds=kinds)


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
        model.criterion()  # made of fields that were checked: what fails there is a bug
        with torch.random.fork_rng(devices=[]), torch.no_grad(), build_errors(what, FIELD_ERRORS):
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
