"""Prediction distillation against a slow loop from the formulas."""

import pytest
import torch

from d3etr_hf.losses import pair_weights, prediction_distillation
from d3etr_hf.matching import AdaptiveMatcher
from d3etr_hf.outputs import SigmoidScores
from tests import slow_reference
from tests.slow_reference import taught

SCORES = SigmoidScores()
MATCHER = AdaptiveMatcher(SCORES)

LAYERS, BATCH = 2, 3
MASK = torch.ones(BATCH, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize("normaliser", ["pairs", "boxes"])
@pytest.mark.parametrize(("teacher_queries", "student_queries"), [(5, 5), (8, 5), (4, 6)])
def test_equals_slow_loop(teacher_queries, student_queries, normaliser):
    teacher = slow_reference.random_group(LAYERS, BATCH, teacher_queries, 3, 1, MASK, seed=1)
    student = slow_reference.random_group(LAYERS, BATCH, student_queries, 3, 1, MASK, seed=2)
    pairs = MATCHER(taught(teacher), student)
    weights = pair_weights(taught(teacher).probabilities, pairs, normaliser)
    loss = prediction_distillation(taught(teacher), student, pairs, SCORES, weights, weights.sum(dim=(1, 2)))
    slow = slow_reference.prediction_loss(
        (teacher.logits, teacher.boxes), (student.logits, student.boxes), pairs, normaliser
    )
    torch.testing.assert_close(loss, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=0)


def test_confident_pairs_outweigh_background():
    """With the "boxes" normaliser a wrong box on a sure teacher query costs more than one on a background query."""
    teacher = slow_reference.random_group(1, 1, 2, 3, 1, MASK[:1], seed=1)
    with torch.no_grad():
        teacher.logits[..., 0, :], teacher.logits[..., 1, :] = 4.0, -6.0
    pairs = MATCHER(taught(teacher), teacher)
    weights = pair_weights(taught(teacher).probabilities, pairs, "boxes")[0, 0]
    assert weights[0] > 100 * weights[1]


def test_unknown_normaliser_is_refused():
    teacher = slow_reference.random_group(1, 1, 2, 3, 1, MASK[:1], seed=1)
    with pytest.raises(ValueError, match="'queries'.*pairs.*boxes"):
        pair_weights(taught(teacher).probabilities, MATCHER(taught(teacher), teacher), "queries")
