"""How much memory a training takes by the number of images in its batch, found out by steps of ever larger ones."""

import torch

from d3etr_hf.data.largest import LargestImages
from d3etr_hf.errors import BatchSizeError
from d3etr_hf.training.memory import GIB, PeakMemory, held_memory, memory_to_be_had, ran_out_of_memory
from d3etr_hf.training.processes import on_main_process
from d3etr_hf.training.trainer import DistillationTrainer

# of the memory there is, what a batch may plan with: allocators cannot use the last of it
USABLE = 0.95
# What a step takes beyond what is held between steps grows on a CPU where images differ in size from step to step: the
# C library's heap falls to pieces. After 20 to 250 steps it was 1.3 to 2.0 times as much; 1 with images of one size.
SCATTERED_HEAP = 1.5


class MemoryGrowth:
    """How the peak memory of a training that is about to begin grows with its batch.

    Args:
        trainer: of the training.
        largest: images of its data set.
        example: of the data set, of which large ones are made.
        varied: whether batches differ in size.

    Attributes:
        peaks: bytes by number of images, ascending, as they are after many steps; of none what is held between steps.
        to_be_had: bytes that this process could hold.
    """

    def __init__(self, trainer: DistillationTrainer, largest: LargestImages, example: dict, varied: bool) -> None:
        self.trainer, self.largest, self.example = trainer, largest, example
        self.device, self.batch_size = trainer.args.device, trainer.state.train_batch_size
        self.held = held_memory(self.device)
        self.peaks = {0: self.held}
        self._scattering = SCATTERED_HEAP if varied and self.device.type == "cpu" else 1.0
        sharing = trainer.args.world_size if self.device.type == "cpu" else 1
        self.to_be_had = memory_to_be_had(self.device, sharing)
        self._input_bytes = 0

    def measure(self) -> None:
        """Try ever larger batches up to the training's own, each about twice the one before; all must call this.

        A process that runs out of memory must end, for the others wait for it within the forward pass: several
        processes try nothing beyond their batch.

        Raises:
            BatchSizeError: the training's batch does not fit.
            RuntimeError: the same, where `auto_find_batch_size` is on; Trainer then tries smaller ones.
        """
        for size in growing_sizes(self.batch_size, self.trainer.args.world_size):
            try:
                self._try_batch(size)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                if size > self.batch_size:  # it was only to be known how memory grows
                    return
                if self.trainer.args.auto_find_batch_size:
                    raise
                raise BatchSizeError(self._refusal()) from error

    def _try_batch(self, size: int) -> None:
        # a GPU's allocator says when it has no more; the operating system would kill the process
        if self.device.type == "cpu" and on_main_process(lambda: self._expected(size) > self.to_be_had):
            raise torch.OutOfMemoryError(f"CPU out of memory. {size} images would need {self._expected(size)} bytes")
        batch = self.trainer.data_collator(self.largest.batch(self.example, size))
        self._input_bytes = batch["pixel_values"].nbytes // size
        peak = PeakMemory(self.device)
        with peak.watching():
            self.trainer.trial_step(batch)
        self.peaks[size] = self.held + int(self._scattering * (peak.bytes - self.held))

    def _expected(self, size: int) -> float:
        """On the line through the two largest batches that were tried."""
        tried, bytes_then = list(self.peaks.items())[-1]
        return bytes_then + (size - tried) * self._bytes_of_an_image

    @property
    def _bytes_of_an_image(self) -> float:
        (fewer, less), (more, most) = [(0, self.peaks[0]), *self.peaks.items()][-2:]
        # of a tiny model they are lost among what else the process does
        return max((most - less) / max(more - fewer, 1), self._input_bytes)

    @property
    def largest_batch(self) -> int:
        """Images of the largest batch that fits, with a little room left; 0 if none does, at most the data set's."""
        tried, bytes_then = list(self.peaks.items())[-1]
        if tried == 0:
            return 0
        more = int((USABLE * self.to_be_had - bytes_then) / self._bytes_of_an_image)
        return max(tried, min(tried + more, self.largest.images))

    def _refusal(self) -> str:
        height, width = self.largest.sides(self.batch_size)
        most = min(self.largest_batch, self.batch_size - 1)
        way_out = f"set per_device_train_batch_size to {most}" if most > 0 else "train on smaller images"
        return (
            f"per_device_train_batch_size={self.batch_size}: a batch of images of {width}×{height} pixels with "
            f"{self.largest.objects} objects each, the largest that training may draw, does not fit in "
            f"{self.to_be_had / GIB:.1f} GiB of memory; {way_out}, or set auto_find_batch_size (probe=False tries it "
            "all the same)"
        )


def growing_sizes(batch_size: int, processes: int = 1) -> list[int]:
    """Numbers of images to try, ascending: the batch's, halves of it, and, by one process alone, at least two."""
    if batch_size == 1 and processes == 1:
        return [1, 2]
    return [batch_size >> halved for halved in reversed(range(batch_size.bit_length()))]
