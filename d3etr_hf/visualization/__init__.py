"""Everything that draws: detections, attention, training curves."""

from d3etr_hf import optional_torchvision  # noqa: F401
