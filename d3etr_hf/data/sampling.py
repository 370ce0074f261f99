"""Which image comes when in training, and what its augmentation draws: known from the seed, whoever reads it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class Draw(IntEnum):
    """What is drawn of a seed: the last of the numbers that `mixed` takes, four of them at least."""

    STEP = 1
    RANDOM_QUERIES = 2
    DENOISING = 4
    UNLABELED_ORDER = 5
    VISIT = 6
    CLASS_EMBEDDING = 7


class TrainingSample(NamedTuple):
    """One image in its turn, as a sampler hands it to `DetectionDataset`.

    Attributes:
        index: the row in the data set; of images without labels the number of its rows and theirs.
        seed: of the run.
        epoch: from 0.
        step: optimizer step within the epoch, from 0.
        repeated: whether it only fills up the last step, so that every process has a batch; it counts for nothing.
        progress: share of the training that is done when its step begins; 0 where that is not known.
        visit: how often the image has come before in this epoch, where there are more places than images.
    """

    index: int
    seed: int
    epoch: int
    step: int
    repeated: bool = False
    progress: float = 0.0
    visit: int = 0

    def image_seed(self, image_id: int) -> int:
        """What all that is drawn for this image in this epoch comes from."""
        again = (self.visit, Draw.VISIT) if self.visit else ()
        return mixed(self.seed, self.epoch, image_id, *again)

    @property
    def step_seed(self) -> int:
        """What all that is drawn for a whole optimizer step comes from."""
        return mixed(self.seed, self.epoch, self.step, Draw.STEP)


class TrainingSampler(Sampler[TrainingSample]):
    """Hands out the images of an epoch, in the same order on every process.

    What an image's augmentation draws goes with it, so that it is the same in a run that goes on after an
    interruption, with any number of data loader workers and on any number of processes.

    Of images without labels every epoch has a number of its own. They come between the others at even distances, so
    that each batch has about the same share of them, and go on from epoch to epoch until each has come once; then they
    are shuffled anew.

    Args:
        dataset: what is trained on; the rows of a `DetectionDataset`'s images without labels follow its own.
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
        self.labeled = len(dataset)  # type: ignore[arg-type]
        beside = getattr(dataset, "unlabeled", None)
        self.unlabeled = 0 if beside is None else len(beside.images)
        self.unlabeled_in_epoch = 0 if beside is None else beside.in_epoch(self.labeled)
        self.images = self.labeled + self.unlabeled_in_epoch
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.step_size = batch_size * accumulated
        self.length = -(-self.images // batch_size) * batch_size if fill_up else self.images
        batches = self.length // batch_size if drop_last else -(-self.length // batch_size)
        self.epoch_steps = -(-batches // accumulated)
        self.total_steps: int | None = None

    def __iter__(self) -> Iterator[TrainingSample]:
        order = self._order()
        for place in range(self.length):
            (index, visit), step = order[place % self.images], place // self.step_size
            done = 0.0 if self.total_steps is None else (self.epoch * self.epoch_steps + step) / self.total_steps
            yield TrainingSample(index, self.seed, self.epoch, step, place >= self.images, done, visit)

    def _order(self) -> list[tuple[int, int]]:
        """The row of each image of the epoch, and how often it has come before in it."""
        labeled = list(range(self.labeled))
        if self.shuffle:  # as Accelerate shuffles
            labeled = torch.randperm(
                self.labeled, generator=torch.Generator().manual_seed(self.seed + self.epoch)
            ).tolist()
        of_labeled, of_unlabeled = ((index, 0) for index in labeled), self._unlabeled_turns()
        # ceilings of the labelled images' share of the places so far: where they rise one of them stands
        so_far = [-(-place * self.labeled // self.images) for place in range(self.images + 1)]
        return [next(of_labeled if now > before else of_unlabeled) for before, now in pairwise(so_far)]

    def _unlabeled_turns(self) -> Iterator[tuple[int, int]]:
        """Of the images without labels, as `_order`."""
        first = self.epoch * self.unlabeled_in_epoch
        passes: dict[int, list[int]] = {}
        visits: Counter[int] = Counter()
        for turn in range(first, first + self.unlabeled_in_epoch):
            number, place = divmod(turn, self.unlabeled)
            if number not in passes:
                passes[number] = self._pass_over_unlabeled(number)
            index = self.labeled + passes[number][place]
            yield index, visits[index]
            visits[index] += 1

    def _pass_over_unlabeled(self, number: int) -> list[int]:
        """Their order when all of them come for so many times, from 0."""
        if not self.shuffle:
            return list(range(self.unlabeled))
        generator = torch.Generator().manual_seed(mixed(self.seed, number, 0, Draw.UNLABELED_ORDER) % 2**63)
        return torch.randperm(self.unlabeled, generator=generator).tolist()

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
    """One seed of several: neighbouring numbers give unrelated ones. Zeros at the end count for nothing."""
    words = [number % 2**64 for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
