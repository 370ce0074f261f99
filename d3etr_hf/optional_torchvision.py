"""A torchvision that cannot be imported is set aside, before Transformers takes it for one that works.

Transformers uses any that is installed. One of another build than torch's (for CUDA beside a torch for CPUs, or of
another version) raises when it is imported, and with it would every detector. Nothing here needs it. The rooms that
import Transformers import this first.
"""

import importlib.util
import logging
import sys

from d3etr_hf.errors import one_line

PUT_RIGHT = "install the torchvision of torch's version and build"


def set_broken_torchvision_aside() -> None:
    """Let imports find no torchvision where the one that is installed raises; said in one line."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # what Python takes for "not installed"
        if (utils := sys.modules.get("transformers.utils")) is not None:  # it looked already, and keeps the answer
            utils.is_torchvision_available.cache_clear()
            utils.is_torchvision_v2_available.cache_clear()
        logging.getLogger(__name__).warning(
            f"torchvision is installed, cannot be imported ({one_line(error)}) and is left out: {PUT_RIGHT}, or none"
        )


set_broken_torchvision_aside()
