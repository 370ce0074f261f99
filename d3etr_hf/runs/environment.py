"""On what a run runs: the device's name and the versions of what it is made with. No host and no user name."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("d3etr_hf", "torch", "transformers", "accelerate", "datasets", "pycocotools")


def device_name() -> str:
    """The accelerator's name, or how many cores of which processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    processors = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", processors.read_text(), re.M) if processors.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"CPU, {os.cpu_count()} cores ({name})"


def describe_environment() -> dict:
    """Device, CPU threads and versions: `{"device", "threads", "versions": {package: version}}`."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return {"device": device_name(), "threads": torch.get_num_threads(), "versions": versions}
