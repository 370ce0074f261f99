"""Outputs survive what Transformers and accelerate do with them."""

import pytest
import torch
from accelerate.utils import convert_to_fp32

from d3etr_hf.outputs import OWN, AttentionMap, DetectorOutput, GroupOutput, Queries, SampledAttention, Supervised


def group() -> GroupOutput:
    half = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)
    maps = (AttentionMap(half[0, :, None].log(), half[0, :, None]),)
    return GroupOutput(logits=half, boxes=half, self_attention=maps, cross_attention=maps)


def test_a_mapping_alone_is_not_taken_apart():
    """ModelOutput spreads a dict in its first field over its own fields, and the field is None then."""
    alone = DetectorOutput(groups={OWN: group()})
    assert alone.groups[OWN].logits.shape == (1, 2, 3, 4)
    proposals = Supervised(group=GroupOutput(logits=torch.ones(1, 2, 3, 4), boxes=torch.ones(1, 2, 3, 4)))
    assert proposals.group.logits.shape == (1, 2, 3, 4) and proposals.assignment is None


@pytest.mark.parametrize("whole", [False, True])
def test_converting_to_float32_keeps_every_part(whole):
    """Accelerate rebuilds what a prepared model returns under autocast."""
    output = DetectorOutput(groups={OWN: group()}, supervised={"proposals": Supervised(group=group())})
    if whole:
        output.memory_mask = torch.ones(2, 1, 1, dtype=torch.bool)
        output.queries = Queries(content=torch.ones(3, 4))
        output.supervised["denoising"] = Supervised(
            group=group(), assignment=torch.zeros(1, 2, 3, dtype=torch.int64), repeats=2
        )
    rebuilt = convert_to_fp32(output)
    assert type(rebuilt) is DetectorOutput and type(rebuilt.groups[OWN]) is GroupOutput
    assert type(rebuilt.groups[OWN].self_attention[0]) is AttentionMap
    for part in (rebuilt.groups[OWN], rebuilt.supervised["proposals"].group):
        assert part.logits.dtype == part.boxes.dtype == part.cross_attention[0].log.dtype == torch.float32
    if whole:
        assert rebuilt.memory_mask.dtype == torch.bool and len(rebuilt.queries) == 3
        assert rebuilt.supervised["denoising"].repeats == 2
        assert rebuilt.supervised["denoising"].assignment.dtype == torch.int64


def test_queries_know_their_number_and_detach():
    anchors = torch.rand(2, 7, 4, requires_grad=True)
    for queries in (Queries(anchors=anchors), Queries(position=torch.zeros(7, 5)), Queries(torch.zeros(2, 7, 5))):
        assert len(queries) == 7
    still = Queries(anchors=anchors).detach()
    assert still.content is still.position is None
    assert not still.anchors.requires_grad and torch.equal(still.anchors, anchors)
    for precision, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert Queries(position=torch.zeros(7, 5, dtype=precision)).detach().position.dtype == expected
    sampled = SampledAttention(torch.rand(1, 1, 7, 2, 2, requires_grad=True), torch.rand(1, 1, 7, 2))
    assert not sampled.detach().places.requires_grad
