"""CLoCKDistill's memory distillation against a slow loop from its formula."""

import pytest
import torch

from d3etr_hf.losses import clockdistill_memory_distillation
from tests import slow_memories
from tests.tiny import random_labels, targets_of


@pytest.mark.parametrize("objects", [[3, 0, 4], [0, 0, 0]], ids=["objects", "none"])
def test_equals_the_slow_loop(objects):
    """Two levels, padding, an image without objects, objects of different size over one cell."""
    levels, targets = slow_memories.random_levels(), targets_of(random_labels(objects, seed=2))
    found = clockdistill_memory_distillation(levels, targets, 3, max(1, sum(objects)))
    expected = torch.tensor(slow_memories.clockdistill_loss(levels, targets), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.sum().backward()
    for level in levels:
        padding = ~level.mask[:, None].expand_as(level.student)
        assert level.student.grad[padding].abs().max() == 0 < level.student.grad[~padding].abs().min()


def test_objects_weigh_five_hundred_times_as_much():
    """As the paper's alpha and beta: memories that differ by one everywhere, half of an image an object."""
    (level,) = slow_memories.random_levels(sizes=((4, 6),))
    level = level._replace(student=level.teacher + 1, mask=torch.ones_like(level.mask))
    half = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.25, 0.5, 0.5, 1.0]])}
    found = clockdistill_memory_distillation([level], targets_of([half] * 3), 3, 3)
    assert found.tolist() == pytest.approx([1 + 1 / 500])
