"""ICD's conditional decoder: instances, attention and values against loops over heads."""

import math

import pytest
import torch
from torch import nn

from d3etr_hf.models.instance_decoder import FAKES, IcdAdapter, describe, sine_of
from tests.slow_memories import random_levels
from tests.tiny import random_labels, targets_of

COUNTS = [2, 0, 3]
TARGETS = targets_of(random_labels(COUNTS, seed=3))


def decoder_of(width=6, their_width=8) -> IcdAdapter:
    torch.manual_seed(0)
    return IcdAdapter(width, their_width, 2, 3)


def levels_of(width=6, their_width=8):
    levels = random_levels(widths=(width, their_width))
    return [level._replace(student=level.student.detach().float(), teacher=level.teacher.float()) for level in levels]


def test_instances_are_the_objects_and_five_fakes_each():
    description, real, there, place, edges = describe(TARGETS, 3)
    assert description.shape == (3, 18, 3 + 256 + 10)
    for image, count in enumerate(COUNTS):
        assert real[image].tolist() == [index < count for index in range(18)]
        assert there[image].tolist() == [index % 3 < count for index in range(18)]
        for index in range(18):
            if not there[image, index]:
                continue
            x, y, width, height = TARGETS.boxes[image, index % 3].tolist()
            left, top, right, bottom = edges[image, index].tolist()
            assert left + right == pytest.approx(width, abs=1e-6) and top + bottom == pytest.approx(height, abs=1e-6)
            assert min(left, right) >= 0.19 * width and min(top, bottom) >= 0.19 * height  # within the box
            if real[image, index]:
                px, py = place[image, index].tolist()
                assert (px - left, py - top) == pytest.approx((x - width / 2, y - height / 2), abs=1e-6)
            label = int(TARGETS.class_labels[image, index % 3])
            assert description[image, index, :3].tolist() == [float(c == label) for c in range(3)]
            bins = [min(4, max(0, math.floor(math.log2(side) + 5))) for side in (width, height)]
            expected = [float(b == found) for found in bins for b in range(5)]
            assert description[image, index, 259:].tolist() == expected
            torch.testing.assert_close(description[image, index, 3:259], sine_of(place[image, index]))


def test_no_object_leaves_instances_that_do_not_count():
    nothing = targets_of(random_labels([0, 0, 0]))
    _, real, there, *_ = describe(nothing, 3)
    assert real.shape == (3, 1 + FAKES) and not real.any() and not there.any()


def test_what_is_decoded_against_a_loop():
    """Heads, padding and places; the attention's own arithmetic once more, image by image."""
    decoder, levels = decoder_of(), levels_of()
    torch.manual_seed(4)
    found = decoder(levels, TARGETS)
    torch.manual_seed(4)
    description, *_ = describe(TARGETS, 3)
    heads, channels = 8, 1
    assert found.attention.shape == (3, heads, 18, 24 + 6) and found.teacher_values.shape == (3, heads, 30, channels)
    for image in range(3):
        tokens, ours, places, kept = [], [], [], []
        for level in levels:
            rows, columns = int(level.mask[image, :, 0].sum()), int(level.mask[image, 0].sum())
            for row in range(level.mask.shape[1]):
                for column in range(level.mask.shape[2]):
                    tokens.append(level.teacher[image, :, row, column])
                    ours.append(level.student[image, :, row, column])
                    places.append(torch.tensor([(column + 0.5) / columns, (row + 0.5) / rows]))
                    kept.append(bool(level.mask[image, row, column]))
        instances = decoder.encoder(description[image])
        keys = torch.stack([decoder.key(t + decoder.place(sine_of(p))) for t, p in zip(tokens, places, strict=True)])
        queries, values = decoder.query(instances), torch.stack([decoder.value(token) for token in tokens])
        for head in range(heads):
            part = slice(head * channels, (head + 1) * channels)
            scores = (queries[:, part] @ keys[:, part].T / math.sqrt(channels)).exp() * torch.tensor(kept)
            expected = scores / scores.sum(-1, keepdim=True)
            torch.testing.assert_close(found.attention[image, head], expected, rtol=1e-4, atol=1e-5)
        attended = torch.cat([found.attention[image, head] @ values[:, head : head + 1] for head in range(heads)], 1)
        said = decoder.predictor(decoder.norm(instances + decoder.output(attended)))
        torch.testing.assert_close(found.confidence[image], said[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.edges[image], said[:, 1:].sigmoid(), rtol=1e-4, atol=1e-5)


def test_values_are_normed_by_head():
    decoder = IcdAdapter(6, 12, 2, 3)
    found, levels = decoder(levels_of(their_width=12), TARGETS), levels_of(their_width=12)
    assert decoder.heads == 4
    token = decoder.student_value(levels[0].student[0, :, 0, 0])
    expected = nn.functional.layer_norm(token.view(4, 3), (3,), eps=1e-4)
    torch.testing.assert_close(found.student_values[0, :, 0], expected)


def test_the_student_learns_nothing_of_the_decoder_and_the_decoder_nothing_of_it():
    decoder, levels = decoder_of(), levels_of()
    for level in levels:
        level.student.requires_grad_()
    found = decoder(levels, TARGETS)
    assert not found.attention.requires_grad and not found.teacher_values.requires_grad
    (found.confidence.sum() + found.edges.sum()).backward(retain_graph=True)
    assert all(level.student.grad is None for level in levels) and decoder.student_value.weight.grad is None
    without = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert without == ["student_value.weight", "student_value.bias"]
    decoder.zero_grad()
    found.student_values.square().sum().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is not None] == without
