"""DETRDistill's masks and qualities against slow loops."""

import pytest
import torch

from d3etr_hf.losses import detrdistill_memory_distillation, query_quality
from d3etr_hf.losses.detrdistill_memory_distillation import target_mask
from d3etr_hf.outputs import NO_OBJECT
from tests import slow_memories
from tests.tiny import random_labels, targets_of


def queries_of(seed=0, count=4, width=5):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, count, width, generator=generator, dtype=torch.float64)
    quality = torch.rand(3, count, generator=generator, dtype=torch.float64)
    quality[1] = 0  # no query of this image answers for an object
    quality[2, 1:] = 0
    return queries, quality


def test_equals_the_slow_loop():
    levels, (queries, quality) = slow_memories.random_levels(), queries_of()
    found = detrdistill_memory_distillation(levels, queries, quality, 3)
    expected = torch.tensor(slow_memories.detrdistill_loss(levels, queries, quality), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.sum().backward()
    for level in levels:
        padding = ~level.mask[:, None].expand_as(level.student)
        assert level.student.grad[padding].abs().max() == 0 < level.student.grad[~padding].abs().min()


def test_the_mask_is_where_good_queries_look_alike():
    """A query that is one of the tokens: that token has the mask's 1; without quality all have the least."""
    (level,), (_, quality) = slow_memories.random_levels(sizes=((4, 6),)), queries_of()
    queries = level.teacher[:, :, 1, 2][:, None].expand(-1, 4, -1)
    mask = target_mask(level, queries, quality)
    assert mask[0, 1, 2] == mask[2, 1, 2] == 1 and (mask[0] == 1).sum() == 1
    assert torch.equal(mask[1], torch.full_like(mask[1], 0.01))


@pytest.mark.parametrize("objects", [[2, 0, 3], [0, 0, 0]], ids=["objects", "none"])
def test_quality_is_score_and_overlap_of_the_assigned_object(objects):
    generator = torch.Generator().manual_seed(1)
    targets = targets_of(random_labels(objects, seed=3))
    probabilities, boxes = torch.rand(3, 4, 3, generator=generator), torch.rand(3, 4, 4, generator=generator) * 0.5
    boxes[..., :2] += 0.25
    assignment = torch.full((3, 4), NO_OBJECT)
    for image, count in enumerate(objects):
        assignment[image, 1 : 1 + count] = torch.arange(count)
    found = query_quality(probabilities, boxes, assignment, targets, exponent=0.3)
    for image in range(3):
        for query in range(4):
            held, expected = int(assignment[image, query]), 0.0
            if held != NO_OBJECT:
                score = float(probabilities[image, query, targets.class_labels[image, held]])
                overlap = intersection_over_union(boxes[image, query].tolist(), targets.boxes[image, held].tolist())
                expected = score**0.3 * overlap**0.7
            assert float(found[image, query]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (found > 0).sum() > 0 or not any(objects)


def intersection_over_union(a, b):
    sides = [
        max(0.0, min(a[k] + a[k + 2] / 2, b[k] + b[k + 2] / 2) - max(a[k] - a[k + 2] / 2, b[k] - b[k + 2] / 2))
        for k in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
