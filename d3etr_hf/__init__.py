"""D3ETR knowledge distillation of DETR detectors, as a Transformers trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3etr_hf.evaluation.image_detections import predict
    from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
    from d3etr_hf.publishing.hub_trainer import D3etrTrainer
    from d3etr_hf.training.training_arguments import D3etrTrainingArguments

__version__ = "0.1.0"

__all__ = ["D3etrConditionalDetrForObjectDetection", "D3etrTrainer", "D3etrTrainingArguments", "predict"]

# imported when they are asked for: each brings torch and Transformers, which `d3etr --help` does not need
MODULES = {
    "D3etrConditionalDetrForObjectDetection": "d3etr_hf.models",
    "D3etrTrainer": "d3etr_hf.publishing.hub_trainer",
    "D3etrTrainingArguments": "d3etr_hf.training.training_arguments",
    "predict": "d3etr_hf.evaluation.image_detections",
}


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
