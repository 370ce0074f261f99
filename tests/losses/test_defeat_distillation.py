"""DeFeat against a slow loop from its formula."""

import pytest
import torch

from d3etr_hf.losses import defeat_distillation
from d3etr_hf.outputs import Targets
from tests import slow_memories
from tests.tiny import random_labels, targets_of


@pytest.mark.parametrize("objects", [[3, 0, 2], [0, 0, 0]], ids=["objects", "none"])
def test_equals_the_slow_loop(objects):
    levels, targets = slow_memories.random_levels(), targets_of(random_labels(objects, seed=2))
    found = defeat_distillation(levels, targets, 3)
    expected = torch.tensor(slow_memories.defeat_loss(levels, targets), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.sum().backward()
    for level in levels:
        padding = ~level.mask[:, None].expand_as(level.student)
        assert level.student.grad[padding].abs().max() == 0 < level.student.grad[~padding].abs().min()


def test_an_object_that_fills_the_image_leaves_no_background():
    (level,) = slow_memories.random_levels(sizes=((4, 6),), batch=3)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(3, 1, 4)
    found = defeat_distillation([level], Targets(torch.zeros(3, 1, dtype=torch.int64), boxes, [1, 1, 1]), 3)
    torch.testing.assert_close(found[0].item(), slow_memories.fitnet_loss([level])[0] / 2, rtol=1e-9, atol=0)
