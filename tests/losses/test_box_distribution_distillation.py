"""Box distribution distillation against slow loops, in bins and from boxes that differ."""

import math

import pytest
import torch

from d3etr_hf.losses import box_distribution_distillation
from d3etr_hf.losses.box_distribution_distillation import carried_over
from d3etr_hf.matching import MatchedPairs, TaughtGroup
from d3etr_hf.outputs import GroupOutput
from d3etr_hf.outputs.boxes import centre_to_corners

LAYERS, BATCH = 2, 2
BINS = torch.tensor([-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 1.0])
OTHER_BINS = torch.tensor([-0.8, -0.3, 0.0, 0.3, 0.8])


def random_group(queries: int, bins: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(BATCH, queries, 2, generator=generator) * 0.1 + 0.45
    sizes = torch.rand(BATCH, queries, 2, generator=generator) * 0.2 + 0.2
    logits = 2 * torch.randn(LAYERS, BATCH, queries, 4, len(bins), generator=generator)
    return {"box_distribution": logits, "box_reference": torch.cat([centres, sizes], dim=-1), "box_bins": bins}


def taught(group: dict[str, torch.Tensor]) -> TaughtGroup:
    queries = group["box_reference"].shape[1]
    return TaughtGroup(torch.rand(LAYERS, BATCH, queries, 3), torch.rand(LAYERS, BATCH, queries, 4), **group)


def slow_carried(probability, reference, bins, onto_reference, onto_bins):
    """A box's distributions (lists) by where its edges lie in the image, and the mass of each within the bins."""
    found, within = [], []
    for edge in range(4):
        axis, sign = edge % 2, -1 if edge < 2 else 1
        start = reference[axis] + sign * reference[2 + axis] / 2
        onto_start = onto_reference[axis] + sign * onto_reference[2 + axis] / 2
        row, inside = [0.0] * len(onto_bins), 0.0
        for mass, distance in zip(probability[edge], bins, strict=True):
            place = start + sign * distance * reference[2 + axis]
            moved = sign * (place - onto_start) / onto_reference[2 + axis]
            inside += mass if onto_bins[0] <= moved <= onto_bins[-1] else 0.0
            if moved <= onto_bins[0]:
                row[0] += mass
            elif moved >= onto_bins[-1]:
                row[-1] += mass
            else:
                low = max(index for index, value in enumerate(onto_bins) if value <= moved)
                share = (moved - onto_bins[low]) / (onto_bins[low + 1] - onto_bins[low])
                row[low] += mass * (1 - share)
                row[low + 1] += mass * share
        found.append(row)
        within.append(inside)
    return found, within


def slow_divergence(teacher, within, student, temperature):
    """The mean over edges of one pair, at a temperature; teacher in probabilities, student in logits (lists)."""
    total = 0.0
    for theirs, inside, ours in zip(teacher, within, student, strict=True):
        soft = [mass ** (1 / temperature) for mass in theirs]
        soft = [mass / sum(soft) for mass in soft]
        powers = [math.exp(value / temperature) for value in ours]
        kl = sum(p * math.log(p * sum(powers) / q) for p, q in zip(soft, powers, strict=True) if p > 0)
        total += inside * kl
    return temperature**2 * total / 4


@pytest.mark.parametrize("temperature", [5.0, 1.0])
def test_equals_a_slow_loop(temperature):
    """Other bins, other boxes, other numbers of queries, pairs in any order, weights."""
    theirs, ours = random_group(4, BINS, 1), random_group(5, OTHER_BINS, 2)
    pairs = MatchedPairs(torch.tensor([[[3, 0, 2]] * 2, [[1, 2, 3]] * 2]), torch.tensor([[[0, 2, 4]] * 2] * 2))
    weight = torch.rand(LAYERS, BATCH, 3, generator=torch.Generator().manual_seed(3))
    total = torch.tensor([2.0, 3.0])
    found = box_distribution_distillation(taught(theirs), GroupOutput(**ours), pairs, weight, total, temperature)
    for layer in range(LAYERS):
        expected = 0.0
        for image in range(BATCH):
            for pair in range(3):
                i, j = int(pairs.teacher[layer, image, pair]), int(pairs.student[layer, image, pair])
                carried, within = slow_carried(
                    theirs["box_distribution"][layer, image, i].softmax(-1).tolist(),
                    theirs["box_reference"][image, i].tolist(),
                    BINS.tolist(),
                    ours["box_reference"][image, j].tolist(),
                    OTHER_BINS.tolist(),
                )
                logits = ours["box_distribution"][layer, image, j].tolist()
                expected += float(weight[layer, image, pair]) * slow_divergence(carried, within, logits, temperature)
        assert float(found[layer]) == pytest.approx(expected / float(total[layer]), rel=1e-4)


def test_mass_stays_and_edges_stay_where_they_are():
    """As far as the student's range goes: here each edge's mean is the same place in the image."""
    theirs, ours = random_group(6, BINS / 10, 1), random_group(6, OTHER_BINS * 3, 2)
    probability = theirs["box_distribution"][0].softmax(-1)
    carried, within = carried_over(
        probability, theirs["box_reference"], BINS / 10, ours["box_reference"], ours["box_bins"]
    )
    torch.testing.assert_close(carried.sum(-1), torch.ones(BATCH, 6, 4))
    torch.testing.assert_close(within, torch.ones(BATCH, 6, 4))
    places = []
    for mass, reference, bins in (
        (probability, theirs["box_reference"], BINS / 10),
        (carried, ours["box_reference"], ours["box_bins"]),
    ):
        sides = torch.cat([reference[..., 2:], reference[..., 2:]], dim=-1)
        outwards = (mass * bins).sum(-1) * sides * torch.tensor([-1, -1, 1, 1])
        places.append(centre_to_corners(reference) + outwards)
    torch.testing.assert_close(*places)


def test_what_lies_beyond_the_last_bin_goes_there_and_does_not_count():
    """Here left and right edges, by two widths."""
    reference = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    far = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    carried, within = carried_over(torch.full((1, 4, 7), 1 / 7), far, BINS, reference, OTHER_BINS)
    torch.testing.assert_close(carried[0, 0, -1], torch.tensor(1.0))
    torch.testing.assert_close(carried[0, 2, 0], torch.tensor(1.0))
    assert (carried[0, 1] > 0).sum() > 3
    torch.testing.assert_close(within[0], torch.tensor([0.0, 5 / 7, 0.0, 5 / 7]))


def test_where_both_count_alike_it_is_d_fines_own():
    """KL of the softened logits, times the square of the temperature (its loss_ddf, plainly weighted)."""
    theirs, ours = random_group(4, BINS, 1), random_group(4, BINS, 2)
    ours["box_reference"] = theirs["box_reference"]
    index = torch.arange(4).expand(LAYERS, BATCH, 4)
    weight = torch.ones(LAYERS, BATCH, 4)
    found = box_distribution_distillation(
        taught(theirs), GroupOutput(**ours), MatchedPairs(index, index), weight, weight.sum((1, 2))
    )
    kl = torch.nn.functional.kl_div(
        (ours["box_distribution"] / 5).log_softmax(-1),
        (theirs["box_distribution"] / 5).softmax(-1),
        reduction="none",
    )
    torch.testing.assert_close(found, 25 * kl.sum(-1).mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_copy_of_the_teacher_has_nothing_to_learn_and_a_gradient_reaches_the_student_alone():
    group = random_group(4, BINS, 1)
    index = torch.arange(4).expand(LAYERS, BATCH, 4)
    arguments = MatchedPairs(index, index), torch.ones(LAYERS, BATCH, 4), torch.full((LAYERS,), 8.0)
    same = box_distribution_distillation(taught(group), GroupOutput(**group), *arguments)
    torch.testing.assert_close(same, torch.zeros(LAYERS), atol=1e-4, rtol=0)
    other = random_group(4, OTHER_BINS, 2)
    logits, theirs = other["box_distribution"].requires_grad_(), group["box_distribution"].requires_grad_()
    box_distribution_distillation(taught(group), GroupOutput(**other), *arguments).sum().backward()
    assert logits.grad.abs().sum() > 0 and theirs.grad is None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_models_without_distributions(role):
    group, nothing = random_group(4, BINS, 1), {"box_distribution": None}
    teacher = taught(nothing | {"box_reference": group["box_reference"]} if role == "teacher" else group)
    student = GroupOutput(**(nothing if role == "student" else group))
    index = torch.arange(4).expand(LAYERS, BATCH, 4)
    with pytest.raises(ValueError, match=f"the {role}'s boxes come from none"):
        box_distribution_distillation(teacher, student, MatchedPairs(index, index), torch.ones(()), torch.ones(()))
