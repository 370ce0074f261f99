"""ViDT's token matching against a slow loop."""

import torch

from d3etr_hf.losses import vidt_distillation
from tests import slow_memories


def test_equals_the_slow_loop():
    levels, generator = slow_memories.random_levels(), torch.Generator().manual_seed(3)
    theirs, ours = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ours.requires_grad_()
    found = vidt_distillation(levels, theirs, ours, 3)
    expected = torch.tensor(slow_memories.vidt_loss(levels, theirs, ours), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.sum().backward()
    assert ours.grad.abs().min() > 0
    for level in levels:
        padding = ~level.mask[:, None].expand_as(level.student)
        assert level.student.grad[padding].abs().max() == 0 < level.student.grad[~padding].abs().min()


def test_a_student_that_is_its_teacher_has_a_finite_gradient():
    """The root of zero has none."""
    (level,) = slow_memories.random_levels(sizes=((4, 6),))
    ours = level.teacher.clone().requires_grad_()
    queries = torch.randn(3, 4, 5, dtype=torch.float64)
    loss = vidt_distillation([level._replace(student=ours)], queries, queries, 3)
    loss.sum().backward()
    assert loss.item() == 0 and ours.grad.abs().max() == 0
