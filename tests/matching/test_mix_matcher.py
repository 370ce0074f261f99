"""MixMatcher against brute force, the slow public loop and its own rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d3etr_hf.errors import NonFiniteCostError
from d3etr_hf.matching import AdaptiveMatcher, fixed_pairs, matched_foreground_share
from d3etr_hf.matching.matching_cost import prediction_cost
from d3etr_hf.outputs import GroupOutput, SigmoidScores
from tests import slow_reference
from tests.slow_reference import public_loop_of, taught

MATCHER = AdaptiveMatcher(SigmoidScores())

MASK = torch.ones(2, 2, 2, dtype=torch.bool)


def group(queries, layers=2, batch=2, classes=3, seed=0):
    return slow_reference.random_group(layers, batch, queries, classes, 1, MASK[:1].expand(batch, 2, 2), seed)


def total_cost(teacher, student, pairs, layer, image):
    cost = slow_reference.cost_matrix(
        teacher.logits[layer, image],
        teacher.boxes[layer, image],
        student.logits[layer, image],
        student.boxes[layer, image],
    )
    counted = slice(None) if pairs.counted is None else pairs.counted[layer, image]
    sides = (side[layer, image][counted].tolist() for side in (pairs.teacher, pairs.student))
    return sum(cost[i][j] for i, j in zip(*sides, strict=True))


def test_cost_equals_slow_loop():
    teacher, student = group(4, seed=1), group(5, seed=2)
    cost = prediction_cost(
        teacher.logits.sigmoid(), teacher.boxes, student.logits, student.boxes, SigmoidScores(), (1.0, 5.0, 2.0)
    )
    slow = slow_reference.cost_matrix(
        teacher.logits[1, 1], teacher.boxes[1, 1], student.logits[1, 1], student.boxes[1, 1]
    )
    torch.testing.assert_close(cost[1, 1], torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    teacher_queries=st.integers(1, 6),
    student_queries=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    threshold=st.sampled_from([0.0, 0.6, 0.8]),
)
def test_optimal_against_brute_force(teacher_queries, student_queries, seed, threshold):
    """Of all of the teacher's queries, or of those whose highest class score is above a threshold."""
    teacher, student = group(teacher_queries, seed=seed), group(student_queries, seed=seed + 1)
    pairs = AdaptiveMatcher(SigmoidScores(), score_threshold=threshold)(taught(teacher), student)
    assert (pairs.counted is None) == (threshold == 0)
    assert pairs.teacher.shape == pairs.student.shape == (2, 2, min(teacher_queries, student_queries))
    for layer in range(2):
        for image in range(2):
            rows = slow_reference.cost_matrix(
                teacher.logits[layer, image],
                teacher.boxes[layer, image],
                student.logits[layer, image],
                student.boxes[layer, image],
            )
            # N_t > N_s: among the teacher queries with the highest class scores
            scores = teacher.logits[layer, image].amax(-1)
            best = scores.topk(min(teacher_queries, student_queries)).indices.tolist()
            best = [i for i in best if scores[i].sigmoid() > threshold]
            brute = slow_reference.brute_force_cost([rows[i] for i in best]) if best else 0.0
            assert total_cost(teacher, student, pairs, layer, image) == pytest.approx(brute, rel=1e-9)
            if threshold > 0:
                assert sorted(pairs.teacher[layer, image][pairs.counted[layer, image]].tolist()) == sorted(best)


def test_equals_public_loop_on_random_tensors(shared_data):
    public_loop = public_loop_of(shared_data)
    sizes = {"L": 3, "B": 2, "C": 11, "K": 12, "M": 2}
    for teacher_queries, student_queries in ((30, 30), (20, 33)):
        teacher = public_loop.random_outputs(N=teacher_queries, seed=1, **sizes)
        student = public_loop.random_outputs(N=student_queries, seed=2, **sizes)
        ours = MATCHER(
            taught(GroupOutput(logits=teacher["logits"], boxes=teacher["boxes"])),
            GroupOutput(logits=student["logits"], boxes=student["boxes"]),
        )
        for layer, images in enumerate(public_loop.matching(teacher, student)):
            for image, (i, j) in enumerate(images):
                pairs = zip(ours.teacher[layer, image].tolist(), ours.student[layer, image].tolist(), strict=True)
                assert set(pairs) == set(zip(i.tolist(), j.tolist(), strict=True))


@pytest.mark.parametrize(("teacher_queries", "student_queries"), [(5, 5), (8, 5), (4, 6)])
def test_student_indices_ascend(teacher_queries, student_queries):
    """The losses skip gathering the student on the strength of this."""
    pairs = MATCHER(taught(group(teacher_queries, seed=1)), group(student_queries, seed=2))
    assert (pairs.student.diff(dim=-1) > 0).all()


def test_foreground_survives_a_smaller_student():
    """Choosing teacher queries by cost would drop the foreground for a student that predicts background only."""
    teacher, student = group(20, seed=1), group(5, seed=2)
    with torch.no_grad():
        teacher.logits.fill_(-6.0)
        teacher.logits[:, :, 15:, 0] = 3.0
        student.logits.fill_(-6.0)
    pairs = MATCHER(taught(teacher), student)
    assert set(pairs.teacher.flatten().tolist()) == {15, 16, 17, 18, 19}
    assert matched_foreground_share(teacher.logits.sigmoid(), pairs) == 1


def test_matched_foreground_share_counts():
    teacher, student = group(4, layers=1, batch=1, seed=1), group(2, layers=1, batch=1, seed=2)
    with torch.no_grad():
        teacher.logits.fill_(-6.0)
        nothing = taught(teacher)
        assert matched_foreground_share(nothing.probabilities, MATCHER(nothing, student)) == 1  # none to match
        teacher.logits[..., :3, 0] = 3.0
    found = taught(teacher)
    assert matched_foreground_share(found.probabilities, MATCHER(found, student)) == pytest.approx(2 / 3)


def test_fixed_matching_is_the_identity_and_refuses_unequal_groups():
    pairs = fixed_pairs(taught(group(5, seed=1)), group(5, seed=2))
    assert pairs.identity
    assert torch.equal(pairs.teacher, torch.arange(5).expand(2, 2, 5)) and torch.equal(pairs.teacher, pairs.student)
    with pytest.raises(ValueError, match="fixed matching"):
        fixed_pairs(taught(group(5)), group(6))


def test_no_gradient_flows_through_the_matching():
    teacher, student = group(4, seed=1), group(4, seed=2)
    pairs = MATCHER(taught(teacher), student)
    assert not pairs.teacher.requires_grad and not pairs.student.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_prediction_is_refused_with_its_place(value):
    """HF_NOTES 12: scipy matches NaN arbitrarily and in silence."""
    teacher, student = group(4, seed=1), group(4, seed=2)
    with torch.no_grad():
        student.logits[1, 0, 2, 1] = value
    with pytest.raises(NonFiniteCostError, match="layer 1, image 0") as caught:
        MATCHER(taught(teacher), student)
    assert (caught.value.layer, caught.value.image) == (1, 0)
