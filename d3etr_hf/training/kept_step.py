"""A file that holds one training step of one process before it was taken: student, batch, random state, options."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from d3etr_hf.errors import DamagedFileError, one_line
from d3etr_hf.files import regular_file, write_errors

STEP = "d3etr_step"  # in the file's metadata
STUDENT, INPUTS = "student", "inputs"  # begin the names of tensors
COUNTS, RANDOM, DEVICE_RANDOM = "counts", "random", "device_random"


@dataclass(frozen=True)
class Batch:
    """What a step starts with.

    Attributes:
        inputs: from `DetectionCollator`, on the device.
        counts: what the step's sums are divided by, see `DistillationTrainer._get_num_items_in_batch`.
        random: states of torch's generators, the CPU's and the device's; of a CPU alone one.
    """

    inputs: Mapping
    counts: torch.Tensor
    random: tuple[torch.Tensor, ...]

    @classmethod
    def begin(cls, inputs: Mapping, counts: torch.Tensor) -> "Batch":
        """Before the forward pass."""
        device = counts.device
        of_device = () if device.type == "cpu" else (torch.get_device_module(device).get_rng_state(),)
        return cls(inputs, counts, (torch.get_rng_state(), *of_device))

    def restore_random(self, device: torch.device) -> None:
        """Have torch's generators draw what they drew, the device's where it is of the same type."""
        torch.set_rng_state(self.random[0])
        if len(self.random) > 1 and device.type != "cpu":
            torch.get_device_module(device).set_rng_state(self.random[1])

    @property
    def image_ids(self) -> list[int]:
        """Of its images, but for those that only repeat others."""
        return [label["image_id"] for label in self.inputs["labels"]]


@dataclass(frozen=True)
class KeptStep:
    """What the file says beside its tensors.

    Attributes:
        what: the reason why the step was kept.
        step: its number, from 1.
        rank, processes: whose batch it is, and of how many.
        labels: of the batch, from `DetectionCollator`.
        config: the student's configuration.
        teacher: its folder or Hub id; None without one.
        options: fields of `D3etrTrainingArguments` that decide about the loss.
        mixed_precision: no, bf16 or fp16.
        device: type of the device.
    """

    what: str
    step: int
    rank: int
    processes: int
    labels: list[dict]
    config: dict
    teacher: str | None
    options: dict
    mixed_precision: str
    device: str


def write_step(path: Path, kept: KeptStep, student: torch.nn.Module, batch: Batch) -> None:
    """Raises: WriteError: it cannot be written."""
    tensors = {f"{STUDENT}.{name}": value for name, value in student.state_dict().items()}
    tensors |= {f"{INPUTS}.{name}": value for name, value in batch.inputs.items() if torch.is_tensor(value)}
    tensors |= {COUNTS: batch.counts, **dict(zip((RANDOM, DEVICE_RANDOM), batch.random, strict=False))}
    # copies: the file takes no tensor that shares its memory with another
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, path, metadata={STEP: json.dumps(asdict(kept))})


def read_step(path: str | Path) -> tuple[KeptStep, dict[str, torch.Tensor], Batch]:
    """What `write_step` wrote: what the file says, the student's state and the batch, on the CPU.

    Raises:
        DamagedFileError: it is no such file, cut off, or cannot be read.
    """
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            kept = KeptStep(**json.loads((file.metadata() or {})[STEP]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts: dict[str, dict] = {STUDENT: {}, INPUTS: {"labels": kept.labels}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value
        random = tuple(tensors[name] for name in (RANDOM, DEVICE_RANDOM) if name in tensors)
        return kept, parts[STUDENT], Batch(parts[INPUTS], tensors[COUNTS], random)
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DamagedFileError(
            f"{path} is no step that a training kept, or damaged ({one_line(error)}): name a file of its folder"
        ) from error
