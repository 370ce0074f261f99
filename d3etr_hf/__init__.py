"""D3ETR knowledge distillation of Conditional DETR detectors, as a Transformers trainer."""

from .arguments import D3etrTrainingArguments
from .models import D3etrConditionalDetrForObjectDetection
from .trainer import D3etrTrainer

__version__ = "0.1.0"

__all__ = ["D3etrConditionalDetrForObjectDetection", "D3etrTrainer", "D3etrTrainingArguments"]
