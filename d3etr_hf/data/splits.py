"""Which images are trained on and which are evaluated: named splits, slices of them, or a part held out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import numpy as np

from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.errors import DatasetError, one_line

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("val", "valid", "validation", "dev")


@dataclass(frozen=True)
class Source:
    """A data set that can be read.

    Attributes:
        name: for messages.
        splits: by its name, what reads and checks each split.
        absent: by name, why a split that the data list cannot be read; it matters where that split is chosen.
    """

    name: str
    splits: dict[str, Callable[[], DetectionDataset]]
    absent: dict[str, str] = field(default_factory=dict)


def choose_splits(
    source: Source, train: str, val: str | None, fraction: float | None, seed: int
) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and the validation split.

    Args:
        source: of the data.
        train: name of a split, or a slice of one such as `train[:80%]`, as `datasets` writes it.
        val: likewise; None for the validation split or, where there is none, the only one beside `train`.
        fraction: of the training split that is held out as validation split instead; None for none.
        seed: of what is held out.

    Raises:
        DatasetError: there is no such split, a slice is no slice or empty, there is nothing to evaluate on, or a
            split cannot be read.
    """
    read: dict[str, DetectionDataset] = {}
    training = _sliced(source, train, read)
    if fraction is not None:
        return hold_out(training, fraction, seed)
    return training, _sliced(source, val or _validation_split(source, train), read)


def _validation_split(source: Source, train: str) -> str:
    trained = train.partition("[")[0]
    # `trainval` of Pascal VOC holds both others
    shared = {"trainval": ("train", *VALIDATION_NAMES), "train": ("trainval",)}
    others = [split for split in source.splits if split not in (trained, *shared.get(trained, ()))]
    listed = [*others, *source.absent] if trained != "trainval" else others
    found = [split for split in listed if split in VALIDATION_NAMES]
    if found:
        return found[0]
    if len(others) == 1:
        logger.warning(
            "%s: there is no validation split; the only other one, %s, is taken (dataset_val_split names another, "
            "validation_fraction holds out a part of the training split)",
            source.name,
            others[0],
        )
        return others[0]
    there = f"there are {', '.join(others)}: choose one" if others else f"there is {train} alone: choose a slice"
    raise DatasetError(
        f"{source.name}: no validation split; {there} by `dataset_val_split`, or hold out a part of {train} by "
        "`validation_fraction`, for example 0.1."
    )


def _sliced(source: Source, split: str, read: dict[str, DetectionDataset]) -> DetectionDataset:
    name, bracket, _ = split.partition("[")
    if name in source.absent:
        raise DatasetError(source.absent[name])
    if name not in source.splits:
        raise DatasetError(f"{source.name}: no split `{name}`: choose one of {', '.join(source.splits)}.")
    if name not in read:
        read[name] = source.splits[name]()
    rows = read[name]
    if not bracket:
        return rows
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise DatasetError(
            f"{source.name}: {split!r} is no slice of a split ({one_line(error)}): write it as {name}[:80%], "
            f"{name}[80%:] or {name}[:1000]."
        ) from None
    if part.from_ >= part.to:
        raise DatasetError(f"{source.name}: {split!r} holds none of the {len(rows)} images of {name}.")
    return rows.select(range(part.from_, part.to)).with_name(f"{rows.name}{split[len(name) :]}")


def hold_out(dataset: DetectionDataset, fraction: float, seed: int) -> tuple[DetectionDataset, DetectionDataset]:
    """What is left of a split, and the part of it that is held out; both in its order, the same for the same seed.

    Raises:
        DatasetError: nothing would be left.
    """
    count = max(1, round(fraction * len(dataset)))
    if count >= len(dataset):
        raise DatasetError(
            f"{dataset.name}: validation_fraction {fraction} of {len(dataset)} images leaves none to train on."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    held, left = np.sort(order[:count]).tolist(), np.sort(order[count:]).tolist()
    note = f"{fraction:g} held out by seed {seed}"
    return (
        dataset.select(left).with_name(f"{dataset.name} without {note}"),
        dataset.select(held).with_name(f"{dataset.name}, {note}"),
    )
