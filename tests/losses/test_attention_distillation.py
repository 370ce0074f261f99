"""Attention distillation against slow loops from the formulas."""

import pytest
import torch

from d3etr_hf.losses import cross_attention_distillation, self_attention_distillation
from d3etr_hf.losses.grids import resample_map
from d3etr_hf.matching import AdaptiveMatcher, MatchedPairs
from d3etr_hf.outputs import AttentionMap, SampledAttention, SigmoidScores
from tests import slow_reference
from tests.slow_reference import random_group, taught

MATCHER = AdaptiveMatcher(SigmoidScores())

LAYERS, BATCH = 2, 3


def mask_of(height: int, width: int, padded: bool) -> torch.Tensor:
    mask = torch.ones(BATCH, height, width, dtype=torch.bool)
    if padded:
        mask[1, -1:] = False
        mask[2, :, -2:] = False
    return mask


# queries, heads and grid of the teacher, of the student; whether the memory is padded
CASES = {
    "equal": ((5, 2, (4, 6)), (5, 2, (4, 6)), False),
    "padding": ((5, 2, (4, 6)), (5, 2, (4, 6)), True),
    "more teacher queries": ((8, 2, (4, 6)), (5, 2, (4, 6)), True),
    "more student queries": ((4, 2, (4, 6)), (6, 2, (4, 6)), True),
    "unequal heads": ((5, 4, (4, 6)), (5, 2, (4, 6)), True),
    "finer teacher grid": ((5, 2, (8, 12)), (5, 2, (4, 6)), False),
    "coarser teacher grid, everything unequal": ((4, 1, (3, 4)), (7, 2, (4, 6)), True),
}


def case(name):
    (t_queries, t_heads, t_grid), (s_queries, s_heads, s_grid), padded = CASES[name]
    masks = mask_of(*t_grid, padded), mask_of(*s_grid, padded)
    teacher = slow_reference.random_group(LAYERS, BATCH, t_queries, 3, t_heads, masks[0], seed=1)
    student = slow_reference.random_group(LAYERS, BATCH, s_queries, 3, s_heads, masks[1], seed=2)
    return teacher, student, masks, MATCHER(taught(teacher), student)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("name", CASES)
def test_self_attention_equals_slow_loop(name, divergence):
    teacher, student, _, pairs = case(name)
    loss = self_attention_distillation(teacher.self_attention, student.self_attention, pairs, BATCH, divergence)
    slow = slow_reference.self_attention_loss(
        [m.probability for m in teacher.self_attention],
        [m.probability for m in student.self_attention],
        pairs,
        divergence,
    )
    torch.testing.assert_close(loss, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("name", CASES)
def test_cross_attention_equals_slow_loop(name, divergence):
    teacher, student, masks, pairs = case(name)
    loss = cross_attention_distillation(
        teacher.cross_attention, student.cross_attention, pairs, *masks, BATCH, divergence
    )
    slow = slow_reference.cross_attention_loss(
        [m.probability for m in teacher.cross_attention],
        [m.probability for m in student.cross_attention],
        pairs,
        *masks,
        divergence,
    )
    torch.testing.assert_close(loss, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss.sum(), [m.log for m in student.cross_attention])
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_padding_gives_no_nan_gradient(divergence):
    """HF_NOTES 4: -inf on padded keys times zero would be NaN, forwards and backwards."""
    mask = mask_of(4, 6, padded=True)
    teacher = slow_reference.random_group(1, BATCH, 4, 3, 2, mask, seed=1)
    scores = torch.randn(BATCH, 2, 4, 24, dtype=torch.float64, requires_grad=True)
    lowest = torch.finfo(scores.dtype).min
    log = scores.masked_fill(~mask.flatten(1)[:, None, None], lowest).log_softmax(-1)
    student = slow_reference.random_group(1, BATCH, 4, 3, 2, mask, seed=2)
    pairs = MATCHER(taught(teacher), student)
    cross_attention_distillation(
        teacher.cross_attention, [AttentionMap(log, log.exp())], pairs, mask, mask, BATCH, divergence
    ).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().sum() > 0
    assert scores.grad.masked_select(~mask.flatten(1)[:, None, None]).abs().max() == 0


def sampled_maps(queries: int, heads: int, seed: int) -> list[SampledAttention]:
    generator = torch.Generator().manual_seed(seed)
    shape = BATCH, heads, queries, 6
    return [
        SampledAttention(
            (0.2 + 0.6 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)).requires_grad_(),
            torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_(),
        )
        for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("sampled", ["student", "teacher", "both"])
def test_sampled_attention_is_compared_on_the_students_grid(sampled, divergence):
    """Against dense or sampled attention, on padded memories, whose gradient must be finite."""
    teacher, student, masks, pairs = case("coarser teacher grid, everything unequal")
    ours, theirs = student.cross_attention, teacher.cross_attention
    if sampled != "teacher":
        ours = sampled_maps(7, 2, seed=3)
    if sampled != "student":
        theirs = sampled_maps(4, 1, seed=4)
    loss = cross_attention_distillation(theirs, ours, pairs, *masks, BATCH, divergence)
    dense = [m.on_grid(masks[1]) if sampled != "teacher" else m for m in ours]
    their_mask = masks[0] if sampled == "student" else masks[1]
    taught_maps = [m.on_grid(masks[1]) if sampled != "student" else m for m in theirs]
    slow = slow_reference.cross_attention_loss(
        [m.probability for m in taught_maps], [m.probability for m in dense], pairs, their_mask, masks[1], divergence
    )
    torch.testing.assert_close(loss, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=0)
    leaves = [part for attention in ours for part in attention] if sampled != "teacher" else [m.log for m in ours]
    if divergence == "mse" and sampled == "teacher":
        leaves = [m.probability for m in ours]
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_resampling_keeps_mass_and_place():
    """A teacher that looks at one token of a twice finer grid makes the student look at the token that covers it."""
    source, target = torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)
    looks_at = torch.zeros(1, 1, 1, 16)
    looks_at[..., 2 * 4 + 1] = 1.0
    resampled = resample_map(looks_at, source, target).probability
    torch.testing.assert_close(resampled.flatten(), torch.tensor([0.0, 0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_unequal_grids_under_autocast():
    """The resampling is a matrix product, which autocast would take in half precision."""
    teacher, student, masks, pairs = case("finer teacher grid")
    maps = [
        [AttentionMap(*(form.float() for form in m)) for m in group.cross_attention] for group in (teacher, student)
    ]
    plain = cross_attention_distillation(*maps, pairs, *masks, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cross_attention_distillation(*maps, pairs, *masks, BATCH), plain, rtol=1e-6, atol=0)


def test_unknown_divergence_is_refused():
    teacher, student, _, pairs = case("equal")
    with pytest.raises(ValueError, match="'js'.*kl.*mse"):
        self_attention_distillation(teacher.self_attention, student.self_attention, pairs, BATCH, "js")


def test_small_divergence_of_large_maps_in_float32():
    """Entropy and cross-entropy nearly cancel: one float32 sum over millions of numbers would not tell the rest."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 8, 300, 400, generator=generator)
    mask = torch.ones(4, 20, 20, dtype=torch.bool)
    index = torch.arange(300).expand(1, 4, 300)
    pairs = MatchedPairs(index, index, identity=True)

    def maps(scores):
        return [AttentionMap(scores.log_softmax(-1), scores.softmax(-1))]

    for noise in (0.03, 0.3):
        other = scores + noise * torch.randn(scores.shape, generator=generator)
        exact, ours = (
            cross_attention_distillation(maps(first), maps(second), pairs, mask, mask, 4.0)
            for first, second in ((other.double(), scores.double()), (other, scores))
        )
        assert ours.item() == pytest.approx(exact.item(), rel=2e-3)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_one_grid_with_two_ideas_of_padding(divergence):
    """What the teacher sees where the student has padding has no bound in the student's logarithm: it is left out."""
    teacher_mask = torch.ones(1, 4, 4, dtype=torch.bool)
    student_mask = teacher_mask.clone()
    student_mask[:, :, 3:] = False
    teacher, student = (
        random_group(1, 1, 3, 2, 2, mask, seed) for seed, mask in enumerate((teacher_mask, student_mask))
    )
    index = torch.arange(3).expand(1, 1, 3)
    pairs = MatchedPairs(index, index, identity=True)
    loss = cross_attention_distillation(
        teacher.cross_attention, student.cross_attention, pairs, teacher_mask, student_mask, 1, divergence
    )
    assert loss.isfinite().all() and loss.abs().max() < 10
