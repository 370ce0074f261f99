"""A run's folder: whose it is, its configuration, its environment."""

from d3etr_hf import optional_torchvision  # noqa: F401
