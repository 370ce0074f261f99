"""Which image comes when in training, and what its augmentation draws: known from the seed, whoever reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class TrainingSample(NamedTuple):
    """One image in its turn, as a sampler hands it to `DetectionDataset`.

    Attributes:
        index: the row in the data set.
        seed: of the run.
        epoch: from 0.
        step: optimizer step within the epoch, from 0.
        repeated: whether it only fills up the last step, so that every process has a batch; it counts for nothing.
        progress: share of the training that is done when its step begins; 0 where that is not known.
    """

    index: int
    seed: int
    epoch: int
    step: int
    repeated: bool = False
    progress: float = 0.0

    def image_seed(self, image_id: int) -> int:
        """What all that is drawn for this image in this epoch comes from."""
        return mixed(self.seed, self.epoch, image_id)

    @property
    def step_seed(self) -> int:
        """What all that is drawn for a whole optimizer step comes from."""
        return mixed(self.seed, self.epoch, self.step, 1)


class TrainingSampler(Sampler[TrainingSample]):
    """Hands out the images of an epoch, in the same order on every process.

    What an image's augmentation draws goes with it, so that it is the same in a run that goes on after an
    interruption, with any number of data loader workers and on any number of processes.

    Args:
        dataset: what is trained on.
        seed: of the order and of all that is drawn for images.
        shuffle: in a new order every epoch; else as the data set has them.
        batch_size: images of one batch on all processes together.
        accumulated: batches of an optimizer step.
        fill_up: hand out images from the beginning again, marked `repeated`, until the last batch is full.
        drop_last: whether a last batch that is not full is left out by who reads.

    Attributes:
        total_steps: optimizer steps of the training; None where that is not known.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        shuffle: bool,
        batch_size: int,
        accumulated: int = 1,
        fill_up: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.images = len(dataset)  # type: ignore[arg-type]
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.step_size = batch_size * accumulated
        self.length = -(-self.images // batch_size) * batch_size if fill_up else self.images
        batches = self.length // batch_size if drop_last else -(-self.length // batch_size)
        self.epoch_steps = -(-batches // accumulated)
        self.total_steps: int | None = None

    def __iter__(self) -> Iterator[TrainingSample]:
        order = list(range(self.images))
        if self.shuffle:  # as Accelerate shuffles
            order = torch.randperm(
                self.images, generator=torch.Generator().manual_seed(self.seed + self.epoch)
            ).tolist()
        for place in range(self.length):
            index, step = order[place % self.images], place // self.step_size
            done = 0.0 if self.total_steps is None else (self.epoch * self.epoch_steps + step) / self.total_steps
            yield TrainingSample(index, self.seed, self.epoch, step, place >= self.images, done)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of, from 0."""
        self.epoch = epoch


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """The context in which torch's global generator of the CPU starts from this seed; outside it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device
        yield


def mixed(*numbers: int) -> int:
    """One seed of several: neighbouring numbers give unrelated ones."""
    words = [number % 2**64 for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
