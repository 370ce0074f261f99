"""Memory and time of a training in advance, from a few steps that leave no trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from d3etr_hf.data import DetectionTransform
from d3etr_hf.data.largest import LargestImages
from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.training.memory import GIB
from d3etr_hf.training.memory_growth import MemoryGrowth
from d3etr_hf.training.optimizer_trial import try_optimizer
from d3etr_hf.training.sampling import training_sampler
from d3etr_hf.training.trainer import DistillationTrainer

# a shorter training is over before it would be worth it
FEWEST_STEPS = 50
# sizes are drawn: it takes many to know their mean
MOST_IMAGES_LOADED, MOST_BATCHES_LOADED, BATCHES_TIMED = 64, 32, 2


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        peak: bytes that this process holds at most, in the step with the largest images.
        to_be_had: bytes that it could hold.
        largest_batch: images of the largest batch of such images that fits, about.
        height, width: of the largest batch's images, pixels.
        objects: of the image that has most.
        step_seconds: of an optimizer step with images as they come, loading included.
        loading_seconds: for how long of these it waits for images.
        steps: of the training.
        processes: that train together.
        without_optimizer: why the optimizer's share is in none of these, in one line; None if it is.
        asks_teacher: whether a teacher was asked in each of them whose outputs the training keeps in a cache.
    """

    peak: int
    to_be_had: int
    largest_batch: int
    height: int
    width: int
    objects: int
    step_seconds: float
    loading_seconds: float
    steps: int
    processes: int = 1
    without_optimizer: str | None = None
    asks_teacher: bool = False

    def lines(self, now: datetime) -> list[str]:
        """As a user reads it."""
        duration = timedelta(seconds=round(self.steps * self.step_seconds))
        left_out = "evaluation" if self.processes == 1 else "evaluation and what processes send each other"
        if self.asks_teacher:
            left_out += ", and as if there were no teacher_cache, which spares the teacher where it knows the images"
        lines = [
            f"a step takes about {self.step_seconds:.3g} s ({self.loading_seconds:.2g} s of them for loading images); "
            f"{self.steps} steps end about {now + duration:%Y-%m-%d %H:%M}, after {duration}, without {left_out}",
            f"peak memory about {self.peak / GIB:.2f} GiB{' a process' if self.processes > 1 else ''}, with images of "
            f"{self.width}×{self.height} pixels and {self.objects} objects each",
            f"largest per_device_train_batch_size that fits in {self.to_be_had / GIB:.1f} GiB: about "
            f"{self.largest_batch}",
        ]
        if self.without_optimizer is not None:
            lines.append(
                "these figures are without the optimizer's share: a copy of it could not be tried "
                f"({self.without_optimizer})"
            )
        return lines


class StepProbe(TrainerCallback):
    """Prints before the first step what the training will take.

    It takes about five steps' time, seven where some steps do not distil, and changes nothing of the training. A
    training of fewer than 50 steps, one that goes on from a checkpoint, one with `torch_compile` (whose first steps
    are of another kind) and one with `split_batches` go without.

    Args:
        trainer: whose training data have a `DetectionTransform`; others are passed over.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Raises: BatchSizeError where a batch does not fit, unless `auto_find_batch_size` tries smaller ones."""
        transform = getattr(self.trainer.train_dataset, "transform", None)
        is_due = args.probe and state.global_step == 0 and state.max_steps >= FEWEST_STEPS
        known = isinstance(transform, DetectionTransform) and args.device.type in ("cpu", "cuda")
        if not is_due or not known or args.torch_compile or self.trainer.accelerator.split_batches:
            return
        lines = forecast(self.trainer).lines(datetime.now())
        if state.is_world_process_zero:
            for line in lines:
                tqdm.write(line)  # there may be a progress bar


def forecast(trainer: DistillationTrainer) -> Forecast:
    """Try out some steps of a training that is about to begin; all processes must call this.

    Raises:
        BatchSizeError: a batch, or what the optimizer keeps, does not fit in memory.
        RuntimeError: the same, where `auto_find_batch_size` is on; Trainer then tries smaller ones.
    """
    args, state = trainer.args, trainer.state
    largest = LargestImages(trainer.train_dataset)  # type: ignore[arg-type]
    with leaving_no_trace(trainer):
        optimizer = try_optimizer(trainer)
        loaded = load_batches(trainer)
        growth = MemoryGrowth(trainer, largest, loaded.example, loaded.varied)
        growth.measure()
        optimizer.kept.clear()  # it was there to take its memory
        batch_seconds, loading_seconds = seconds_of_batch(trainer, loaded.typical), loaded.seconds
    if args.dataloader_num_workers > 0:  # they load while the step before is taken
        loading_seconds = max(0.0, loading_seconds / args.dataloader_num_workers - batch_seconds)
    accumulated = args.gradient_accumulation_steps
    height, width = largest.sides(state.train_batch_size)
    return Forecast(
        peak=growth.peaks[state.train_batch_size],
        to_be_had=growth.to_be_had,
        largest_batch=growth.largest_batch,
        height=height,
        width=width,
        objects=largest.objects,
        step_seconds=accumulated * (batch_seconds + loading_seconds) + optimizer.seconds,
        loading_seconds=accumulated * loading_seconds,
        steps=state.max_steps,
        processes=args.world_size,
        without_optimizer=optimizer.failure,
        asks_teacher=trainer.teacher_cache is not None,
    )


def seconds_of_batch(trainer: DistillationTrainer, batches: list[dict]) -> float:
    """Mean over steps that distil and those that do not, as many of each as the schedule has; without loading."""

    def mean(**step: int) -> float:
        return float(np.mean([seconds_of(partial(trainer.trial_step, batch, **step)) for batch in batches]))

    schedule, steps = trainer.args.schedule, trainer.state.max_steps
    distilled, plain = mean(), schedule.first_plain_step(steps)
    if plain is None:
        return distilled
    share = schedule.share(steps)
    return share * distilled + (1 - share) * mean(step=plain)


@dataclass(frozen=True)
class _Loaded:
    """Batches as training gets them, of about the mean size; an example; seconds that a batch takes to load.

    Attributes:
        varied: whether batches differ in size.
    """

    typical: list[dict]
    example: dict
    seconds: float
    varied: bool


def load_batches(trainer: DistillationTrainer) -> _Loaded:
    """The first batches of this process, loaded here without workers."""
    args, dataset, size = trainer.args, trainer.train_dataset, trainer.state.train_batch_size
    together = size * args.world_size
    wanted = min(max(MOST_IMAGES_LOADED // size, BATCHES_TIMED), MOST_BATCHES_LOADED)
    samples = list(islice(training_sampler(args, trainer.accelerator, dataset, size), wanted * together))
    whole = len(samples) // together * together or len(samples)
    batches, seconds = [], []
    for start in range(args.process_index * size, whole, together):
        began = time.perf_counter()
        examples = [dataset[sample] for sample in samples[start : start + size]]
        batches.append(trainer.data_collator(examples))
        seconds.append(time.perf_counter() - began)
    varied = len({batch["pixel_values"].shape for batch in batches}) > 1
    mean = float(np.mean([batch["pixel_values"].numel() for batch in batches]))
    batches.sort(key=lambda batch: abs(batch["pixel_values"].numel() - mean))
    return _Loaded(batches[:BATCHES_TIMED], examples[0], float(np.mean(seconds)), varied)


@contextmanager
def leaving_no_trace(trainer: DistillationTrainer) -> Iterator[None]:
    """The context of trial steps after which random numbers and the student's buffers are what they were.

    All that is drawn comes from torch's generators. Trial steps leave no gradients; parameters and optimizer must be
    left alone.
    """
    device, model = trainer.args.device, trainer.model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()
