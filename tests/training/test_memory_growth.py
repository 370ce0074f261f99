"""Which batches are tried; what is made of them is in test_step_probe.py."""

from types import SimpleNamespace

import pytest
import torch

from d3etr_hf.training import memory_growth
from d3etr_hf.training.memory_growth import MemoryGrowth, growing_sizes


@pytest.mark.parametrize("batch_size", range(1, 40))
def test_growing_sizes_end_with_the_batch_and_cost_little(batch_size):
    sizes = growing_sizes(batch_size)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and len(sizes) >= 2
    assert batch_size in sizes and sum(sizes) <= max(3, 2 * batch_size)


@pytest.mark.parametrize(("processes", "largest"), [(1, 2), (2, 1)])
def test_several_processes_try_nothing_that_one_alone_may_run_out_of_memory_in_and_go_on(
    monkeypatch, processes, largest
):
    """Losses average over the processes within the forward pass: one that is a size ahead would hang or mix them."""
    tried, sharing = [], []
    monkeypatch.setattr(memory_growth, "memory_to_be_had", lambda _, processes: sharing.append(processes) or 2**40)

    def trial_step(batch):
        tried.append(len(batch["pixel_values"]))
        if tried[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    args = SimpleNamespace(device=torch.device("cpu"), world_size=processes, auto_find_batch_size=False)
    trainer = SimpleNamespace(
        args=args,
        state=SimpleNamespace(train_batch_size=1),
        trial_step=trial_step,
        data_collator=lambda examples: {"pixel_values": torch.stack(examples)},
    )
    images = SimpleNamespace(images=100, batch=lambda example, size: [example] * size)
    growth = MemoryGrowth(trainer, images, torch.zeros(3, 32, 32), varied=False)
    growth.measure()
    assert max(tried) == largest and list(growth.peaks) == [0, 1] and sharing == [processes]
    assert growth.largest_batch == 100  # of the data set, though memory has room for more
    images.images = 10**9  # of a model that takes next to nothing, the pixels themselves still count
    assert growth.largest_batch <= 2**40 / (3 * 32 * 32 * 4) + 1
