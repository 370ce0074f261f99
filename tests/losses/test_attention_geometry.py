"""Sampled attention compared by centres and spreads, and place by place, against loops from the formulas."""

import math
from dataclasses import replace

import pytest
import torch

from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.losses.attention_geometry import moment_distillation, place_distillation
from d3etr_hf.matching import MatchedPairs
from d3etr_hf.outputs import AttentionMap, SampledAttention

LAYERS, BATCH, POINTS = 2, 2, 3


def sampled(heads: int, queries: int, seed: int) -> list[SampledAttention]:
    generator = torch.Generator().manual_seed(seed)
    shape = BATCH, heads, queries, POINTS
    return [
        SampledAttention(
            torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2,
            torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1),
        )
        for _ in range(LAYERS)
    ]


def dense(heads: int, queries: int, mask: torch.Tensor, seed: int) -> list[AttentionMap]:
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for _ in range(LAYERS):
        scores = torch.randn(BATCH, heads, queries, mask[0].numel(), generator=generator, dtype=torch.float64)
        scores = scores.masked_fill(~mask.flatten(1)[:, None, None], -1e30)
        maps.append(AttentionMap(scores.log_softmax(-1), scores.softmax(-1)))
    return maps


def mask_of(rows: int, columns: int) -> torch.Tensor:
    """Of 4 x 6 tokens; the second image is smaller."""
    mask = torch.ones(BATCH, 4, 6, dtype=torch.bool)
    mask[1, rows:], mask[1, :, columns:] = False, False
    return mask


PAIRS = MatchedPairs(
    torch.tensor([[[2, 0, 1], [1, 3, 0]], [[0, 1, 2], [3, 2, 1]]]), torch.tensor([0, 1, 2]).expand(2, 2, 3)
)


def places_of(attention, layer: int, image: int, head: int, query: int, mask) -> list[tuple[float, float, float]]:
    """x, y and weight of everything that a query looks at."""
    part = attention[layer]
    if isinstance(part, SampledAttention):
        places, weights = part.places[image, head, query], part.weights[image, head, query]
        return [(float(x), float(y), float(w)) for (x, y), w in zip(places, weights, strict=True)]
    rows, columns = int(mask[image, :, 0].sum()), int(mask[image, 0].sum())
    probability = part.probability[image, head, query].reshape(mask.shape[1:])
    return [
        ((x + 0.5) / columns, (y + 0.5) / rows, float(probability[y, x])) for y in range(rows) for x in range(columns)
    ]


def slow_moments(places) -> list[float]:
    total = sum(w for *_, w in places)
    means = [sum(place[axis] * place[2] for place in places) / total for axis in (0, 1)]
    spreads = [sum((place[axis] - means[axis]) ** 2 * place[2] for place in places) / total for axis in (0, 1)]
    return [*means, *(math.sqrt(spread) for spread in spreads)]


@pytest.mark.parametrize("kinds", ["sampled", "dense to sampled", "unequal heads"])
def test_moments_equal_a_loop(kinds):
    masks = mask_of(4, 6), mask_of(3, 5)
    teacher = dense(2, 4, masks[0], 1) if kinds == "dense to sampled" else sampled(2, 4, 1)
    student = sampled(1 if kinds == "unequal heads" else 2, 3, 2)
    found = moment_distillation(teacher, student, PAIRS, *masks, BATCH)
    for layer in range(LAYERS):
        total = 0.0
        for image in range(BATCH):
            for t, s in zip(PAIRS.teacher[layer, image].tolist(), range(3), strict=True):
                heads = [[head] for head in range(2)] if kinds != "unequal heads" else [[0, 1]]
                for group in heads:
                    theirs = [p for head in group for p in places_of(teacher, layer, image, head, t, masks[0])]
                    own_heads = group if kinds != "unequal heads" else [0]
                    ours = [p for head in own_heads for p in places_of(student, layer, image, head, s, masks[1])]
                    pair = zip(slow_moments(theirs), slow_moments(ours), strict=True)
                    total += sum(abs(a - b) for a, b in pair) / len(heads)
        assert float(found[layer]) == pytest.approx(total / (3 * BATCH), rel=1e-6)


def test_places_equal_a_loop():
    teacher, student = sampled(2, 4, 1), sampled(2, 3, 2)
    found = place_distillation(teacher, student, PAIRS, BATCH)
    for layer in range(LAYERS):
        total = 0.0
        for image in range(BATCH):
            for t, s in zip(PAIRS.teacher[layer, image].tolist(), range(3), strict=True):
                for head in range(2):
                    theirs = places_of(teacher, layer, image, head, t, None)
                    ours = places_of(student, layer, image, head, s, None)
                    for (x, y, w), (other_x, other_y, v) in zip(theirs, ours, strict=True):
                        total += w * math.log(w / v) + w * (abs(x - other_x) + abs(y - other_y))
        assert float(found[layer]) == pytest.approx(total / (3 * 2 * BATCH), rel=1e-6)


@pytest.mark.parametrize("distil", [moment_distillation, place_distillation])
def test_pairs_that_do_not_count_teach_nothing(distil):
    """Of three pairs two: as if there were no third, the mean over those that count."""
    teacher, student = sampled(2, 4, 1), sampled(2, 3, 2)
    counted = torch.tensor([True, False, True]).expand(LAYERS, BATCH, 3)
    few = MatchedPairs(PAIRS.teacher[..., [0, 2]], PAIRS.student[..., [0, 2]])
    masks = (mask_of(4, 6), mask_of(4, 6)) if distil is moment_distillation else ()
    found = distil(teacher, student, replace(PAIRS, counted=counted), *masks, BATCH * 2 / 3)
    torch.testing.assert_close(found, distil(teacher, student, few, *masks, BATCH))


def test_gradient_is_finite_where_all_weight_is_on_one_place_and_the_students_alone():
    student = [SampledAttention(torch.full((1, 1, 1, 2, 2), 0.5, requires_grad=True), torch.tensor([[[[1.0, 0.0]]]]))]
    places = torch.rand(1, 1, 1, 2, 2, requires_grad=True)
    teacher = [SampledAttention(places, torch.tensor([[[[0.0, 1.0]]]]))]
    pairs = MatchedPairs(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64))
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    for loss in (
        moment_distillation(teacher, student, pairs, mask, mask, 1),
        place_distillation(teacher, student, pairs, 1),
    ):
        gradient, of_teacher = torch.autograd.grad(loss.sum(), (student[0].places, places), allow_unused=True)
        assert loss.isfinite().all() and gradient.isfinite().all() and of_teacher is None


def test_places_of_unlike_models_are_refused():
    with pytest.raises(IncompatibleTeacherError, match="cross_attention_space='places': .*grid or moments"):
        place_distillation(dense(2, 4, mask_of(4, 6), 1), sampled(2, 3, 2), PAIRS, BATCH)
    with pytest.raises(IncompatibleTeacherError, match="cross_attention_space='places': .*place by place"):
        place_distillation(sampled(2, 4, 1), sampled(1, 3, 2), PAIRS, BATCH)
