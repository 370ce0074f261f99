"""FitNet's error against a slow loop."""

import torch

from d3etr_hf.losses import fitnet_distillation
from tests import slow_memories


def test_equals_the_slow_loop():
    levels = slow_memories.random_levels()
    loss = fitnet_distillation(levels, 3)
    expected = torch.tensor(slow_memories.fitnet_loss(levels), dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_padding_has_no_gradient_and_no_value():
    (level,) = slow_memories.random_levels(sizes=((4, 6),))
    loss = fitnet_distillation([level], 3)
    loss.sum().backward()
    padding = ~level.mask[:, None].expand_as(level.student)
    assert level.student.grad[padding].abs().max() == 0 < level.student.grad[~padding].abs().min()
    with torch.no_grad():
        moved = level._replace(student=level.student + 9 * padding)
    assert torch.equal(fitnet_distillation([moved], 3), loss.detach())
