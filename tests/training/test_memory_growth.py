"""Which batches are tried; what is made of them is in test_step_probe.py."""

import pytest

from d3etr_hf.training.memory_growth import growing_sizes


@pytest.mark.parametrize("batch_size", range(1, 40))
def test_growing_sizes_end_with_the_batch_and_cost_little(batch_size):
    sizes = growing_sizes(batch_size)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and len(sizes) >= 2
    assert batch_size in sizes and sum(sizes) <= max(3, 2 * batch_size)
