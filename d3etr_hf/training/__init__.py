"""Options, teacher, objective and trainer."""

from d3etr_hf import optional_torchvision  # noqa: F401
