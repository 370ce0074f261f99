"""Queries of ground truth with noise: how far it goes, what it depends on, and who takes them."""

import pytest
import torch

from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.query_adapters import NoisedLabels
from d3etr_hf.outputs import NO_OBJECT, OWN, GroupRequest
from d3etr_hf.training.denoising import NOISED, check_denoising, noised_queries
from d3etr_hf.training.distillation import Distillation
from tests.tiny import random_labels, targets_of, tiny_model

OPTIONS = Distillation(denoising_groups=2)
CLASSES = 7


def noised(counts, ids, step=0, options=OPTIONS, seed=0):
    """Of as many images; labels are the same for the same place in a batch."""
    return noised_queries(targets_of(random_labels(counts, CLASSES)), ids, CLASSES, options, seed, step)


def test_noise_stays_within_its_bounds_and_fills_them():
    labels = random_labels([500], CLASSES)
    found = noised_queries(targets_of(labels), [3], CLASSES, OPTIONS, 0, 0)
    assert list(found.queries) == [f"{NOISED}_1", f"{NOISED}_2"]
    boxes = labels[0]["boxes"]
    for queries in found.queries.values():
        moved = (queries.anchors[0, :, :2] - boxes[:, :2]) / (boxes[:, 2:] / 2)
        scaled = queries.anchors[0, :, 2:] / boxes[:, 2:] - 1
        for noise in (moved, scaled):
            assert 0.38 < noise.abs().max() <= 0.4 + 1e-5 and noise.mean().abs() < 0.02
        changed = (queries.content[0, :, 0] != labels[0]["class_labels"]).double().mean()
        assert changed == pytest.approx(0.2 * (1 - 1 / CLASSES), abs=0.05)
    first, second = found.queries.values()
    assert (first.anchors != second.anchors).all()


def test_noise_of_an_image_does_not_depend_on_its_batch():
    """Nor on the process that sees it; another step draws other noise."""
    whole, alone = noised([3, 2], [11, 12]), noised([3], [11])
    for name, queries in alone.queries.items():
        assert torch.equal(whole.queries[name].anchors[:1], queries.anchors)
        assert torch.equal(whole.queries[name].content[:1], queries.content)
    for other in (noised([3], [13]), noised([3], [11], step=1), noised([3], [11], seed=1)):
        assert not torch.equal(other.queries[f"{NOISED}_1"].anchors, alone.queries[f"{NOISED}_1"].anchors)


def test_places_without_an_object_are_not_used():
    found = noised([2, 0, 3], [1, 2, 3])
    assert found.assignment.tolist() == [[0, 1, NO_OBJECT], [NO_OBJECT] * 3, [0, 1, 2]]
    seen = found.masks[f"{NOISED}_1"][:, 0, 0]
    assert seen.tolist() == [[True, True, False], [True] * 3, [True] * 3]  # nobody may see nothing at all


def test_a_batch_without_any_object_has_one_query_a_group():
    found = noised([0, 0], [1, 2])
    assert found.assignment.tolist() == [[NO_OBJECT], [NO_OBJECT]]
    assert found.queries[f"{NOISED}_1"].anchors.shape == (2, 1, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_anchors_decodes_them(family):
    """Its own queries as without them; what learns has a gradient, in a batch without an object as well."""
    model = tiny_model(2, family)
    if model.anchor_size == 0:
        with pytest.raises(UnsupportedOptionError, match=f"denoising_groups=2: .*a {model.title}, have no anchors"):
            check_denoising(model, OPTIONS)
        return
    check_denoising(model, OPTIONS)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    alone = model(pixels, request=GroupRequest()).groups[OWN]
    embedded = NoisedLabels(CLASSES, model.width)
    for counts in ([2, 1], [0, 0]):
        found = noised(counts, [1, 2])
        model.query_adapters.update(dict.fromkeys(found.queries, embedded))
        output = model(pixels, request=GroupRequest(found.queries, masks=found.masks))
        torch.testing.assert_close(output.groups[OWN].boxes, alone.boxes, atol=1e-5, rtol=1e-5)
        found.supervise(output)
        assert set(output.groups) == {OWN}
        part = output.supervised[NOISED]
        assert part.repeats == 2 and part.assignment.shape == part.group.boxes.shape[:3]
        labels = random_labels(counts, CLASSES)
        few = [label | {"class_labels": label["class_labels"] % 3} for label in labels]
        losses = model.criterion().losses(part.group, targets_of(few), part.assignment)
        embedded.zero_grad()
        sum(value.sum() for value in losses.values()).backward()
        gradient = embedded.embedding.weight.grad.abs().sum()
        assert gradient > 0 if sum(counts) else gradient == 0
        assert all(value.isfinite().all() for value in losses.values())
