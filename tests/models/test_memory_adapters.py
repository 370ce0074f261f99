"""What is learned to compare memories."""

import pytest
import torch
from torch import nn

from d3etr_hf.models.memory_adapters import (
    ClockdistillAdapter,
    DefeatAdapter,
    FgdAdapter,
    FitnetAdapter,
    RelationBlock,
    VidtAdapter,
)
from tests.slow_memories import random_levels
from tests.tiny import targets_of

NONE = targets_of([{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 3)


def single(levels):
    return tuple(level._replace(student=level.student.float(), teacher=level.teacher.float()) for level in levels)


@pytest.mark.parametrize(("width", "their_width"), [(5, 5), (5, 9), (9, 5)])
def test_each_level_has_a_matrix_that_keeps_variance(width, their_width):
    levels = single(random_levels(widths=(width, their_width)))
    adapter = FitnetAdapter(width, their_width, 2, 3)
    for level, carried, projection in zip(levels, adapter(levels, NONE), adapter.projections, strict=True):
        matrix = projection.weight[..., 0, 0]
        expected = torch.einsum("ts,bshw->bthw", matrix, level.student)
        torch.testing.assert_close(carried.student * level.mask[:, None], expected * level.mask[:, None])
        assert carried.teacher is level.teacher and carried.mask is level.mask
        assert float(matrix.detach().square().sum() / their_width) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("kind", [ClockdistillAdapter, FgdAdapter, VidtAdapter])
def test_equal_widths_need_no_projection(kind):
    levels = single(random_levels())
    for level, carried in zip(levels, kind(5, 5, 2, 3)(levels, NONE), strict=True):
        assert torch.equal(carried.student, level.student * level.mask[:, None])
    assert all(isinstance(each, nn.Conv2d) for each in kind(5, 9, 2, 3).projections)


def test_padding_is_as_beyond_the_map():
    """A convolution of 3 by 3 cells sees the same whatever padding holds."""
    (level,) = single(random_levels(sizes=((4, 6),)))
    adapter = DefeatAdapter(5, 5, 1, 3)
    nn.init.normal_(adapter.projections[0].weight)
    (first,) = adapter([level], NONE)
    noise = 9 * torch.randn_like(level.student) * ~level.mask[:, None]
    (second,) = adapter([level._replace(student=level.student + noise)], NONE)
    assert torch.equal(first.student, second.student)
    alone = level.student[1:2, :, :3]  # the second image, cut to what is no padding
    expected = nn.functional.conv2d(alone, adapter.projections[0].weight, padding=1)
    torch.testing.assert_close(first.student[1:2, :, :3], expected)


def test_relation_block_against_a_loop():
    block = RelationBlock(6)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(2, 6, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    found = block(features, mask)
    first, norm, _, last = block.transform
    for image in range(2):
        tokens = [features[image, :, row, column] for row, column in mask[image].nonzero().tolist()]
        scores = [(block.weigh.weight[0] * token).sum().exp().item() for token in tokens]
        context = sum(score * token for score, token in zip(scores, tokens, strict=True)) / sum(scores)
        hidden = first.weight @ context + first.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(found[image], last.weight @ hidden.clamp(min=0) + last.bias, rtol=1e-4, atol=1e-4)


def test_relation_blocks_add_nothing_at_first_and_differ():
    levels = single(random_levels())
    adapter = FgdAdapter(5, 5, 2, 3)
    for level in adapter(levels, NONE):
        assert level.student_context.abs().max() == level.teacher_context.abs().max() == 0
    nn.init.ones_(adapter.teacher_relations[0].transform[-1].weight)
    first, second = adapter(levels, NONE)
    assert (
        first.teacher_context.abs().max()
        > 0
        == first.student_context.abs().max()
        == second.teacher_context.abs().max()
    )


def test_queries_are_carried_one_by_one():
    adapter, queries = VidtAdapter(5, 9, 1, 3), torch.randn(2, 4, 5)
    carried = adapter.carried_queries(queries)
    torch.testing.assert_close(carried, queries @ adapter.queries.weight[..., 0, 0].T)
    assert torch.equal(VidtAdapter(5, 5, 1, 3).carried_queries(queries), queries)
