"""Where queries look, against the stock model's maps and the formula's matching."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from d3etr_hf.errors import IncompatibleTeacherError, PictureError
from d3etr_hf.matching import AdaptiveMatcher, TaughtGroup
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.outputs import (
    OWN,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    Queries,
    SampledAttention,
    SigmoidScores,
)
from d3etr_hf.outputs.attention_maps import EVENLY
from d3etr_hf.visualization.query_attention import attention_of_detection, memory_maps, partner_queries
from tests.slow_reference import cost_matrix
from tests.tiny import padded_batch, tiny_model
from tests.visualization.drawn import IMAGE, pixels_for

CLASSES = ["circle", "rectangle", "triangle"]


@pytest.fixture
def processor():
    return load_image_processor(None, 48, 80)


def stock_outputs(model, batch):
    """What the stock class gives under eager attention, built and loaded on its own."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "eager"
    twin = model.stock_class(config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin(**batch, output_attentions=True)


def slow_map(cross_attention, image, query, rows, columns, width):
    """One layer's map (B, M, N, H*W) for one query, mean over heads, cell by cell."""
    heads = cross_attention.shape[1]
    return torch.tensor(
        [
            [sum(cross_attention[image, head, query, y * width + x].item() for head in range(heads)) / heads]
            for y in range(rows)
            for x in range(columns)
        ]
    ).reshape(rows, columns)


def test_maps_are_the_stock_model_s_without_the_padding():
    """Guards against rows taken for columns, padding left in the map, and another image's or query's map."""
    model, batch = tiny_model(), padded_batch(3)
    with torch.no_grad():
        output = model(**batch, request=GroupRequest(cross_attention=True))
    stock = stock_outputs(model, batch)
    for image, (rows, columns) in enumerate([(8, 8), (6, 6), (6, 5)]):  # stride 8
        maps = memory_maps(output, image, query=4)
        assert maps.shape == (3, rows, columns)
        for layer, found in enumerate(maps):
            expected = slow_map(stock.cross_attentions[layer], image, 4, rows, columns, width=8)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
            assert found.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pad_size", [None, {"height": 96, "width": 96}])
@pytest.mark.parametrize("detection", [0, 5])
def test_a_detection_and_its_attention(processor, pad_size, detection):
    """Guards against the wrong query for a score, against boxes of the resized image, and dropout that is left on.

    A processor that pads by itself changes nothing: batches are padded by the collator.
    """
    processor.pad_size = pad_size
    model = tiny_model(dropout=0.5, attention_dropout=0.5).train()
    found, teacher = attention_of_detection(IMAGE, model, processor, detection=detection)
    assert teacher is None and not model.training
    outputs = stock_outputs(model, pixels_for(processor))
    scores = [
        (score, query, label)
        for query, of_query in enumerate(outputs.logits[0].sigmoid().tolist())
        for label, score in enumerate(of_query)
    ]
    score, query, label = sorted(scores, reverse=True)[detection]
    assert (found.query, found.class_name) == (query, CLASSES[label])
    assert found.score == pytest.approx(score, abs=1e-5)
    x, y, width, height = outputs.pred_boxes[0, query].tolist()
    assert found.box == pytest.approx(((x - width / 2) * 60, (y - height / 2) * 90, width * 60, height * 90), abs=1e-3)
    embedding = model.model.query_position_embeddings.weight[query]
    point = model.model.decoder.ref_point_head(embedding).sigmoid()
    assert found.reference_point == pytest.approx((point[0].item() * 60, point[1].item() * 90))
    rows, columns = 9, 6  # 72 × 48 pixels, stride 8
    assert found.maps.shape == (3, rows, columns)
    for layer, attention in enumerate(outputs.cross_attentions):
        expected = slow_map(attention, 0, query, rows, columns, width=6)
        torch.testing.assert_close(found.maps[layer], expected, atol=1e-6, rtol=1e-4)


def test_the_reference_point_is_where_the_box_head_starts(processor):
    """The centre of a box is sigmoid(offset + logit of the point): the point itself for a head that gives zeros."""
    model = tiny_model()
    torch.nn.init.zeros_(model.bbox_predictor.layers[-1].weight)
    torch.nn.init.zeros_(model.bbox_predictor.layers[-1].bias)
    found, _ = attention_of_detection(IMAGE, model, processor)
    x, y, width, height = found.box
    assert found.reference_point == pytest.approx((x + width / 2, y + height / 2), abs=1e-3)


@pytest.mark.parametrize("teacher_queries", [1, 4, 7, 12])
def test_the_partner_is_the_assignment_of_the_formula(processor, teacher_queries):
    """Classes by name, costs of the last layers, and with more teacher queries those of the highest class score."""
    names = {0: "triangle", 1: "hexagon", 2: "circle", 3: "rectangle"}
    teacher = tiny_model(3, num_queries=teacher_queries, decoder_layers=2, id2label=names)
    student = tiny_model(4)
    batch = pixels_for(processor)
    of_teacher, of_student = stock_outputs(teacher, batch), stock_outputs(student, batch)
    logits = of_teacher.logits[0][:, [2, 3, 0]]
    chosen = sorted(range(teacher_queries), key=lambda query: -logits[query].max().item())[:7]
    cost = cost_matrix(
        logits[chosen], of_teacher.pred_boxes[0][chosen], of_student.logits[0], of_student.pred_boxes[0]
    )
    partners = {int(s): chosen[t] for t, s in zip(*linear_sum_assignment(np.array(cost)), strict=True)}
    assert len(partners) == min(7, teacher_queries) and any(s != t for s, t in partners.items())

    order = of_student.logits[0].flatten().argsort(descending=True).tolist()
    for rank, pair in enumerate(order[:12]):
        query = pair // 3
        if query not in partners:
            with pytest.raises(PictureError, match=rf"detection {rank} \(query {query} .* has no partner"):
                attention_of_detection(IMAGE, student, processor, teacher, rank)
            continue
        found, partner = attention_of_detection(IMAGE, student, processor, teacher, rank)
        assert (found.query, partner.query) == (query, partners[query])
        scores = of_teacher.logits[0, partner.query].sigmoid()
        assert partner.class_name == names[scores.argmax().item()]
        assert partner.score == pytest.approx(scores.max().item(), abs=1e-5)
        assert partner.maps.shape == (2, 9, 6)
    if teacher_queries == 1:
        suggested = next(rank for rank, pair in enumerate(order) if pair // 3 in partners)
        unmatched = next(rank for rank, pair in enumerate(order) if pair // 3 not in partners)
        assert suggested > 0
        with pytest.raises(PictureError, match=rf"has 1 queries .* 7; choose detection {suggested}, for example"):
            attention_of_detection(IMAGE, student, processor, teacher, unmatched)


def test_the_matcher_s_weights_count(processor):
    """By position alone and by class alone, twins whose queries are shuffled find each other."""
    student, teacher = tiny_model(5), tiny_model(5)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    embeddings = teacher.model.query_position_embeddings.weight
    embeddings.data = embeddings.data[order]
    with torch.no_grad():
        groups = [model(**pixels_for(processor), request=GroupRequest()).groups[OWN] for model in (teacher, student)]
    taught = TaughtGroup(groups[0].logits.sigmoid(), groups[0].boxes)
    expected = {int(query): place for place, query in enumerate(order)}
    for weights in ((1, 5, 2), (0, 5, 2), (0, 0, 1)):
        assert partner_queries(taught, groups[1], AdaptiveMatcher(SigmoidScores(), *weights)) == expected


def test_errors_name_what_to_do(processor):
    student = tiny_model()
    for detection in (-1, 21):
        with pytest.raises(PictureError, match=rf"detection is {detection}: .* 0\.\.20 .* of its 7 queries"):
            attention_of_detection(IMAGE, student, processor, detection=detection)
    other = tiny_model(1, id2label={0: "circle", 1: "hexagon", 2: "triangle"})
    with pytest.raises(IncompatibleTeacherError, match=r"no class named \['rectangle'\]"):
        attention_of_detection(IMAGE, student, processor, other)


def test_a_family_with_softmax_and_no_reference_points(processor):
    """Each query is one detection, of its best class; nothing is drawn where the query has no anchor."""
    student, teacher = tiny_model(model_type="detr", num_queries=5, decoder_layers=2), tiny_model(3)
    outputs = stock_outputs(student, pixels_for(processor))
    scores, labels = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    order = scores.argsort(descending=True).tolist()
    for rank, query in enumerate(order):
        found, partner = attention_of_detection(IMAGE, student, processor, teacher, rank)
        assert (found.query, found.class_name) == (query, CLASSES[labels[query]])
        assert found.score == pytest.approx(scores[query].item(), abs=1e-5)
        assert found.reference_point is None and partner.reference_point is not None
        expected = slow_map(outputs.cross_attentions[1], 0, query, 9, 6, width=6)
        torch.testing.assert_close(found.maps[1], expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(PictureError, match=r"detection is 5: .* 0\.\.4 .* of its 5 queries"):
        attention_of_detection(IMAGE, student, processor, detection=5)


def test_sampled_attention_lies_where_its_places_are():
    """Two places in the centres of two cells, on a memory whose last row and column are padding."""
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, :3, :4] = True
    places = torch.tensor([[2.5 / 4, 1.5 / 3], [0.5 / 4, 2.5 / 3]]).view(1, 1, 1, 2, 2)
    sampled = SampledAttention(places, torch.tensor([0.75, 0.25]).view(1, 1, 1, 2))
    group = GroupOutput(cross_attention=(sampled,))
    output = DetectorOutput(groups={OWN: group}, queries=Queries(content=torch.zeros(1, 4)), memory_mask=mask)
    expected = torch.zeros(1, 3, 4)
    expected[0, 1, 2], expected[0, 2, 0] = 0.75, 0.25
    expected = (expected + EVENLY / 12) / (1 + EVENLY)
    torch.testing.assert_close(memory_maps(output, 0, 0), expected)
