"""What leaves the machine: the run folder, the model card, the pictures, and the way to the Hub."""

from d3etr_hf import optional_torchvision  # noqa: F401
