"""Knowledge distillation of Conditional DETR detectors with D3ETR, on Hugging Face Transformers."""

__version__ = "0.1.0"
