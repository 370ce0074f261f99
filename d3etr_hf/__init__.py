"""D3ETR knowledge distillation of Conditional DETR detectors, as a Transformers trainer."""

from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

__version__ = "0.1.0"

__all__ = ["D3etrConditionalDetrForObjectDetection", "D3etrTrainer", "D3etrTrainingArguments"]
