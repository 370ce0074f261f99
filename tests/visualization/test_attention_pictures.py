"""Attention pictures against the stock model's maps, the formula's matching, and the pixels that are drawn."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from scipy.optimize import linear_sum_assignment
from transformers import ConditionalDetrForObjectDetection

from d3etr_hf.errors import IncompatibleTeacherError, PictureError
from d3etr_hf.matching import AdaptiveMatcher
from d3etr_hf.models.loading import load_image_processor
from d3etr_hf.visualization import attention_pictures
from d3etr_hf.visualization.attention_pictures import (
    DIMMED,
    QueryAttention,
    attention_of_detection,
    attention_overlay,
    draw_attention,
    draw_attention_of,
    memory_maps,
    partner_queries,
)
from d3etr_hf.visualization.pictures import class_style
from tests.recorded_figures import record_figures
from tests.slow_reference import cost_matrix
from tests.tiny import padded_batch, tiny_model

CLASSES = ["circle", "rectangle", "triangle"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))


@pytest.fixture
def processor():
    return load_image_processor(None, 48, 80)


def stock_outputs(model, batch):
    """What the stock class gives under eager attention, built and loaded on its own."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "eager"
    twin = ConditionalDetrForObjectDetection(config).eval()
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
        output = model(**batch, return_groups=True, return_cross_attention=True)
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
    """Guards against the wrong query for a score, against boxes of the resized image, and dropout that is left on."""
    processor.pad_size = pad_size
    model = tiny_model(dropout=0.5, attention_dropout=0.5).train()
    found, teacher = attention_of_detection(IMAGE, model, processor, detection=detection)
    assert teacher is None and not model.training
    batch = dict(processor(IMAGE, return_tensors="pt"))
    outputs = stock_outputs(model, batch)
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
    width = 6 if pad_size is None else 12
    for layer, attention in enumerate(outputs.cross_attentions):
        expected = slow_map(attention, 0, query, rows, columns, width)
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
    batch = dict(processor(IMAGE, return_tensors="pt"))
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
    batch = dict(processor(IMAGE, return_tensors="pt"))
    with torch.no_grad():
        outputs = [model(**batch, return_groups=True) for model in (teacher, student)]
    expected = {int(query): place for place, query in enumerate(order)}
    for matcher in (AdaptiveMatcher(), AdaptiveMatcher(class_weight=0), AdaptiveMatcher(0, 0, 1)):
        assert partner_queries(*outputs, torch.arange(3), matcher) == expected


def test_errors_name_what_to_do(processor):
    student = tiny_model()
    for detection in (-1, 21):
        with pytest.raises(PictureError, match=rf"detection is {detection}: .* 0\.\.20 .* \(7 queries × 3 classes\)"):
            attention_of_detection(IMAGE, student, processor, detection=detection)
    other = tiny_model(1, id2label={0: "circle", 1: "hexagon", 2: "triangle"})
    with pytest.raises(IncompatibleTeacherError, match=r"no class named \['rectangle'\]"):
        attention_of_detection(IMAGE, student, processor, other)
    scaled = load_image_processor(None, 48, 80)
    scaled.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(IncompatibleTeacherError, match="image processors differ in image_mean"):
        models, processors = {"a": student, "b": tiny_model(1)}, {"a": scaled, "b": processor}
        draw_attention_of(IMAGE, models, processors, "none.png")


def test_overlay():
    """Each panel is scaled by its own maximum; where nothing is attended, the image alone is left, dimmed."""
    grey = np.linspace(0.2, 0.9, 9 * 15).reshape(9, 15)
    attention = torch.zeros(3, 5)
    attention[1, 4] = 0.03
    attention[2, 0] = 0.015
    overlay = attention_overlay(grey, attention)
    assert overlay.shape == (9, 15, 3) and 0 <= overlay.min() and overlay.max() <= 1
    np.testing.assert_allclose(overlay[:3, :9], DIMMED * grey[:3, :9, None].repeat(3, axis=2))
    # at the centre of a cell, three pixels to the cell, resizing leaves the value as it is
    np.testing.assert_allclose(overlay[4, 13], colormaps["inferno"](1.0)[:3], atol=1e-6)
    alpha = np.sqrt(0.5)
    expected = (1 - alpha) * DIMMED * grey[7, 1] + alpha * np.array(colormaps["inferno"](alpha)[:3])
    np.testing.assert_allclose(overlay[7, 1], expected, atol=1e-6)
    np.testing.assert_array_equal(overlay, attention_overlay(grey, attention / 8))
    # two pixels to the cell: three quarters of the way to its centre along both axes, of its own maximum still
    between = attention_overlay(np.zeros((6, 10)), attention)[2, 8]
    np.testing.assert_allclose(between, 0.75 * np.array(colormaps["inferno"](0.75)[:3]), atol=1e-6)


def row(layers, class_name="rectangle", box=(10.0, 20.0, 30.0, 40.0), seed=0):
    maps = torch.rand(layers, 9, 6, generator=torch.Generator().manual_seed(seed))
    maps = maps / maps.sum(dim=(1, 2), keepdim=True)
    return QueryAttention(3, class_name, 0.5, box, (20.0, 30.0), maps)


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.setattr(attention_pictures, "DOTS_PER_INCH", 50)  # a small picture is written faster
    return record_figures(monkeypatch, attention_pictures)


def test_rows_of_models_and_columns_of_their_own_layers(tmp_path, figures):
    """Guards against a panel under another layer's title, and against rows scaled or stretched together."""
    rows = {"teacher": row(4, "Rectangle ", seed=1), "student": row(2, box=(-20.0, 10.0, 120.0, 130.0), seed=2)}
    draw_attention(IMAGE, rows, tmp_path / "a.png", CLASSES)
    draw_attention(IMAGE, rows, tmp_path / "b.png", CLASSES)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    axes = figures[0].axes
    assert [each.get_title(loc="left") for each in axes] == [
        *("teacher", "layer 1", "layer 2", "layer 3", "layer 4"),
        *("student", "layer 1", "layer 2"),
    ]
    by_row = [axes[1:5], axes[6:]]
    for panels, (first, each) in zip(by_row, zip((axes[0], axes[5]), rows.values(), strict=True), strict=True):
        np.testing.assert_array_equal(first.images[0].get_array(), np.asarray(IMAGE))
        assert [text.get_text() for text in first.texts] == ["rectangle 0.50"]  # as the common list calls it
        assert first.patches[-1].get_edgecolor()[:3] == pytest.approx(class_style(1)[0])
        for layer, panel in enumerate(panels):
            pixels = panel.images[0].get_array()
            grey = np.asarray(IMAGE.convert("L").resize((400, 600), Image.Resampling.BILINEAR)) / 255
            np.testing.assert_allclose(pixels, attention_overlay(grey, each.maps[layer]))
            assert panel.images[0].get_extent() == [0, 60, 90, 0]
            assert panel.get_xlim() == (0, 60) and panel.get_ylim() == (90, 0)
            assert panel.get_title(loc="right") == f"max {100 * each.maps[layer].max().item():.1f} %"
            assert panel.patches[0].get_bbox().bounds == each.box
            assert panel.lines[0].get_xydata().tolist() == [[20, 30]]
    for column in (0, 1, 2):  # aligned, the teacher above
        upper, lower = axes[column].get_position(), axes[5 + column].get_position()
        assert upper.x0 == lower.x0 and upper.y0 > lower.y1


def test_titles_fit_and_no_cell_overlaps(tmp_path, figures):
    wide = Image.new("L", (200, 100))
    draw_attention(wide, {"a-detector-with-a-name-of-30-ch": row(6)}, tmp_path / "a.png")
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    cells = [axes.get_window_extent(renderer) for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in zip(cells, cells[1:], strict=False))
    title = figure.axes[0]._left_title.get_window_extent(renderer)
    assert title.width <= cells[0].width + 1
    for axes, cell in zip(figure.axes[1:], cells[1:], strict=True):
        left, right = (text.get_window_extent(renderer) for text in (axes._left_title, axes._right_title))
        assert left.x1 < right.x0 and right.x1 <= cell.x1 + 1 and left.y0 >= cell.y1
    draw_attention(wide, {"a": row(1)}, tmp_path / "a.png")  # narrow: the note takes two lines
    note = figures[1].texts[0].get_window_extent(renderer)
    assert note.x1 <= figures[1].bbox.x1 and note.y0 >= 0
    assert note.y1 < figures[1].axes[0].get_window_extent(renderer).y0


def test_a_model_alone_and_a_teacher_first(tmp_path, processor, figures):
    student, teacher = tiny_model(), tiny_model(1, decoder_layers=1)
    draw_attention_of(IMAGE, {"alone": student}, {"alone": processor}, tmp_path / "a.png")
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["alone", "layer 1", "layer 2", "layer 3"]
    models, processors = {"big": teacher, "small": student}, {"big": processor, "small": processor}
    draw_attention_of(IMAGE, models, processors, tmp_path / "a.png", CLASSES, detection=1)
    titles = [axes.get_title(loc="left") for axes in figures[1].axes]
    assert titles == ["big", "layer 1", "small", "layer 1", "layer 2", "layer 3"]
    of_student, of_teacher = attention_of_detection(IMAGE, student, processor, teacher, 1)
    assert figures[1].axes[1].patches[0].get_bbox().bounds == pytest.approx(of_teacher.box)
    assert figures[1].axes[3].patches[0].get_bbox().bounds == pytest.approx(of_student.box)
