"""ICD's loss against a slow loop."""

import math

import pytest
import torch

from d3etr_hf.losses import icd_distillation
from d3etr_hf.outputs import DecodedInstances


def decoded_of(objects=(2, 0), fakes=2, heads=3, tokens=4, channels=5) -> DecodedInstances:
    """Random ones in float64; each object is followed by its fakes, after all objects."""
    generator, most = torch.Generator().manual_seed(0), max(1, *objects)
    count = most * (1 + fakes)

    def normal(*shape):
        return torch.randn(len(objects), *shape, generator=generator, dtype=torch.float64)

    there = torch.tensor([[index % most < held for index in range(count)] for held in objects])
    return DecodedInstances(
        attention=normal(heads, count, tokens).softmax(-1),
        teacher_values=normal(heads, tokens, channels),
        student_values=normal(heads, tokens, channels).requires_grad_(),
        confidence=normal(count).requires_grad_(),
        edges=normal(count, 4).sigmoid().requires_grad_(),
        target_edges=normal(count, 4).sigmoid(),
        real=there & (torch.arange(count) < most),
        there=there,
    )


def slow_loss(decoded, fakes, objects):
    distillation = identification = localisation = 0.0
    heads = decoded.attention.shape[1]
    for image in range(len(decoded.real)):
        for instance in range(decoded.real.shape[1]):
            real, there = bool(decoded.real[image, instance]), bool(decoded.there[image, instance])
            score = 1 / (1 + math.exp(-decoded.confidence[image, instance].item()))
            if there:
                identification -= math.log(score if real else 1 - score)
            if not real:
                continue
            left, top, right, bottom = decoded.target_edges[image, instance].tolist()
            sides = left + right, top + bottom, left + right, top + bottom
            pairs = zip(decoded.edges[image, instance].tolist(), (left, top, right, bottom), sides, strict=True)
            localisation += sum(abs(found - edge) / side for found, edge, side in pairs)
            for head in range(heads):
                for token, weight in enumerate(decoded.attention[image, head, instance].tolist()):
                    theirs, ours = (
                        values[image, head, token].tolist()
                        for values in (decoded.teacher_values, decoded.student_values)
                    )
                    squares = [(t - s) ** 2 for t, s in zip(theirs, ours, strict=True)]
                    distillation += weight * sum(squares) / len(squares)
    return (distillation / heads + identification / (1 + fakes) + localisation) / objects


@pytest.mark.parametrize("objects", [(2, 0), (1, 3), (0, 0)])
def test_equals_the_slow_loop(objects):
    decoded, count = decoded_of(objects), max(1, sum(objects))
    found = icd_distillation(decoded, 2, count)
    assert found.shape == (1,) and (found.item() == 0) == (sum(objects) == 0)
    assert found.item() == pytest.approx(slow_loss(decoded, 2, count), rel=1e-9)
    found.sum().backward()
    for part in (decoded.student_values, decoded.confidence, decoded.edges):
        assert part.grad.isfinite().all() and (part.grad.abs().sum() > 0) == (sum(objects) > 0)
