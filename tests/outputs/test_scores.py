"""Sigmoid and softmax scores against slow loops in float64."""

import math

import pytest
import torch

from d3etr_hf.outputs import SelectedScores, SigmoidScores, SoftmaxScores, wide

KINDS = {"sigmoid": SigmoidScores(), "softmax": SoftmaxScores()}
CLASSES = 4


def logits_of(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    outputs = CLASSES + (name == "softmax")
    return 3 * torch.randn(*shape, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_targets(*shape: int, largest: float = 1.0, seed: int = 5) -> torch.Tensor:
    return largest * torch.rand(*shape, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_probabilities(name: str, row: list[float]) -> list[float]:
    if name == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in row]
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row[:-1]]


def slow_entropy(name: str, row: list[float], target: list[float]) -> float:
    probabilities = slow_probabilities(name, row)
    if name == "sigmoid":
        pairs = zip(target, probabilities, strict=True)
        return -sum(p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in pairs)
    share = sum(target)
    target = [p / share for p in target] if share > 1 else target
    nothing = max(0.0, 1 - share)
    everything = zip([*target, nothing], [*probabilities, 1 - sum(probabilities)], strict=True)
    return -sum(p * math.log(q) for p, q in everything if p > 0)


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_equal_slow_loop(name):
    scores, logits = KINDS[name], logits_of(name, 2, 5)
    found = scores.probabilities(logits)
    assert found.shape == (2, 5, CLASSES) and scores.classes(logits) == CLASSES
    for row, expected in zip(found.flatten(0, 1).tolist(), logits.flatten(0, 1).tolist(), strict=True):
        assert row == pytest.approx(slow_probabilities(name, expected), rel=1e-12)
    assert scores.probabilities(logits.bfloat16()).dtype == torch.float32


# a sigmoid teacher that sees several classes in a query gives a softmax student targets that exceed one
@pytest.mark.parametrize("largest", [0.2, 1.0], ids=["below one", "beyond one"])
@pytest.mark.parametrize("name", KINDS)
def test_entropy_equals_slow_loop(name, largest):
    logits, targets = logits_of(name, 3, 6), soft_targets(3, 6, largest=largest)
    assert (targets.sum(-1) > 1).any() == (largest == 1.0)
    found = KINDS[name].entropy(logits, targets)
    assert found.shape == (3, 6)
    rows = zip(found.flatten().tolist(), logits.flatten(0, 1).tolist(), targets.flatten(0, 1).tolist(), strict=True)
    for value, row, target in rows:
        assert value == pytest.approx(slow_entropy(name, row, target), rel=1e-10)


@pytest.mark.parametrize("largest", [0.2, 1.0], ids=["below one", "beyond one"])
@pytest.mark.parametrize("name", KINDS)
def test_pairwise_entropy_is_the_entropy_of_all_pairs(name, largest):
    """The matching compares what the loss then pulls together."""
    logits, targets = logits_of(name, 3, 6), soft_targets(3, 7, largest=largest)
    found = KINDS[name].pairwise_entropy(logits, targets)
    assert found.shape == (3, 7, 6)
    for teacher in range(7):
        for student in range(6):
            alone = KINDS[name].entropy(logits[:, student], targets[:, teacher])
            torch.testing.assert_close(found[:, teacher, student], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_entropy_is_least_at_its_own_probabilities(name):
    """A student that says what its teacher says has no gradient, whichever way its logits are read."""
    logits = logits_of(name, 4, 5).requires_grad_()
    targets = KINDS[name].probabilities(logits).detach()
    KINDS[name].entropy(logits, targets).sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_targets_of_a_softmax_student_are_a_distribution():
    """What is left to one is no object's; what exceeds one is shared out; nothing is an object where all is zero."""
    targets = torch.tensor([[0.25, 0.25, 0.0], [0.9, 0.9, 0.2], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    SoftmaxScores().entropy(logits, targets).sum().backward()
    # the gradient of a cross-entropy is softmax minus target, if the target sums to one
    used = (logits.softmax(-1) - logits.grad).detach()
    expected = torch.tensor(
        [[0.25, 0.25, 0.0, 0.5], [0.45, 0.45, 0.1, 0.0], [0, 0, 0, 1.0], [1.0, 0, 0, 0]], dtype=torch.float64
    )
    torch.testing.assert_close(used, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_ranking_orders_as_the_probabilities_do(name):
    logits = logits_of(name, 2, 9)
    ranking, probabilities = KINDS[name].ranking(logits), KINDS[name].probabilities(logits)
    counts = ranking > -torch.inf
    for image in range(2):
        order = ranking[image][counts[image]].argsort()
        assert torch.equal(order, probabilities[image][counts[image]].argsort())
    if name == "sigmoid":
        assert counts.all()
    else:  # each query is one detection: its likeliest object, however likely none is
        assert torch.equal(counts.sum(-1), torch.ones(2, 9, dtype=torch.int64))
        assert torch.equal(ranking.argmax(-1), probabilities.argmax(-1))


@pytest.mark.parametrize("name", KINDS)
def test_ranking_does_not_saturate(name):
    """In float32 the probabilities of both queries are one."""
    logits = torch.full((1, 2, CLASSES + (name == "softmax")), -20.0)
    logits[0, 0, 1], logits[0, 1, 2] = 30.0, 40.0
    probabilities, ranking = KINDS[name].probabilities(logits), KINDS[name].ranking(logits)
    assert probabilities[0, 0, 1] == probabilities[0, 1, 2] == 1
    if name == "sigmoid":  # a log-softmax saturates at zero too, where nothing is left to tell apart
        assert ranking[0, 1, 2] > ranking[0, 0, 1]
    low = torch.full((1, 2, CLASSES + (name == "softmax")), 0.0)
    low[0, :, 0], low[0, :, -1] = torch.tensor([-120.0, -130.0]), 100.0
    low[0, :, 1:-1] = -500.0
    if name == "softmax":
        assert (KINDS[name].probabilities(low) == 0).all()
        best = KINDS[name].ranking(low)
        assert best[0, 0, 0] > best[0, 1, 0] > -torch.inf


def test_wide_keeps_double_and_widens_half():
    assert wide(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.zeros(1, dtype=torch.float32)).dtype == torch.float32
    assert wide(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", KINDS)
def test_selected_classes_score_as_among_all(name):
    """Renormalised over the selected ones, a query that sees another class would be a confident false positive."""
    index, logits, targets = [3, 1], logits_of(name, 6), soft_targets(5)[:, :2]
    scores = SelectedScores(KINDS[name], index)
    assert scores.classes(logits) == 2
    for found, row in zip(scores.probabilities(logits).tolist(), logits.tolist(), strict=True):
        assert found == pytest.approx([slow_probabilities(name, row)[label] for label in index], rel=1e-12)
    pairs = scores.pairwise_entropy(logits[None], targets[None])[0]
    for i, target in enumerate(targets.tolist()):
        spread = [0.0, target[1], 0.0, target[0]]
        for j, row in enumerate(logits.tolist()):
            assert pairs[i, j].item() == pytest.approx(slow_entropy(name, row, spread), rel=1e-9)
            assert scores.entropy(logits[j], targets[i]).item() == pytest.approx(pairs[i, j].item(), rel=1e-9)
