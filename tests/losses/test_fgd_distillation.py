"""FGD against a slow loop from its equations."""

import pytest
import torch

from d3etr_hf.losses import fgd_distillation
from d3etr_hf.losses.fgd_distillation import attentions
from d3etr_hf.losses.memory_cells import foreground_weights
from tests import slow_memories
from tests.tiny import random_labels, targets_of


def levels_with_contexts(seed=0):
    generator = torch.Generator().manual_seed(seed + 10)
    return tuple(
        level._replace(
            student_context=torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_(),
            teacher_context=torch.randn(3, 5, generator=generator, dtype=torch.float64),
        )
        for level in slow_memories.random_levels(seed=seed)
    )


@pytest.mark.parametrize("objects", [[3, 0, 4], [0, 0, 0]], ids=["objects", "none"])
def test_equals_the_slow_loop(objects):
    """Two levels, padding, an image without objects, objects that overlap."""
    levels, targets = levels_with_contexts(), targets_of(random_labels(objects, seed=2))
    found = fgd_distillation(levels, targets, 3, max(1, sum(objects)))
    expected = torch.tensor(slow_memories.fgd_loss(levels, targets), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.sum().backward()
    for level in levels:
        padding = ~level.mask[:, None].expand_as(level.student)
        assert level.student.grad[padding].abs().max() == 0 < level.student.grad[~padding].abs().min()
        assert level.student_context.grad.abs().min() > 0


def test_the_case_can_tell_faults_apart():
    """Some cell must be held by two objects of different size, and some by none."""
    (level, _), targets = levels_with_contexts(), targets_of(random_labels([3, 0, 4], seed=2))
    cells = slow_memories.cells_of(targets, level, 2)
    held = {place: [len(each) for each in cells if place in each] for place in set().union(*cells)}
    assert any(len(set(sizes)) > 1 for sizes in held.values())
    assert len(held) < int(level.mask[2].sum())


def test_every_object_weighs_the_same():
    """The weights of one that no other overlaps sum to one, large or small."""
    mask, targets = torch.ones(2, 8, 8, dtype=torch.bool), targets_of(random_labels([1, 1], seed=1))
    sums = foreground_weights(targets, mask).sum(dim=(1, 2))
    torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64))


def test_attention_has_a_mean_of_one_in_half_padded_images():
    (level,) = slow_memories.random_levels(sizes=((4, 6),))
    places, channels = attentions(level.teacher, level.mask, 0.5)
    assert places[~level.mask].abs().max() == 0
    counts = level.mask.sum(dim=(1, 2))
    torch.testing.assert_close(places.sum(dim=(1, 2)), counts.double())
    torch.testing.assert_close(channels.mean(1), torch.ones(3, dtype=torch.float64))
