"""The pixels and texts of attention pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import RTDetrImageProcessorPil

from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.visualization import attention_picture
from d3etr_hf.visualization.attention_picture import DIMMED, attention_overlay, draw_attention, draw_attention_of
from d3etr_hf.visualization.detection_grid import class_style
from d3etr_hf.visualization.query_attention import QueryAttention, attention_of_detection
from tests.recorded_figures import record_figures
from tests.tiny import tiny_model
from tests.visualization.drawn import IMAGE

CLASSES = ["circle", "rectangle", "triangle"]


@pytest.fixture
def processor():
    return load_image_processor(None, 48, 80)


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
    return QueryAttention(3, class_name, 0.5, box, maps, (20.0, 30.0))


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.setattr(attention_picture, "DOTS_PER_INCH", 50)  # a small picture is written faster
    return record_figures(monkeypatch, attention_picture)


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
            assert panel.get_title(loc="right") == f"{100 * each.maps[layer].max().item():.1f} %"
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


def test_without_a_reference_point_none_is_drawn_or_explained(tmp_path, figures):
    plain = replace(row(1), reference_point=None)
    draw_attention(IMAGE, {"a": plain, "b": row(1)}, tmp_path / "a.png")
    draw_attention(IMAGE, {"a": plain}, tmp_path / "a.png")
    both, alone = figures
    assert [len(axes.lines) for axes in both.axes] == [0, 0, 0, 2] and "from which it starts" in both.texts[
        0
    ].get_text()
    assert "b looks for the object where a does" in both.texts[0].get_text().replace("\n", " ")
    assert "Where the rows are alike" not in alone.texts[0].get_text()
    assert not any(axes.lines for axes in alone.axes) and "from which it starts" not in alone.texts[0].get_text()


def test_a_teacher_of_other_pixels_sees_its_own(tmp_path, processor, figures):
    """As in distillation: its detection is what it finds on pixels of its own processor."""
    squares = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    student, teacher = tiny_model(), tiny_model(1)
    _, partner = attention_of_detection(IMAGE, student, processor, teacher, 0, squares)
    with torch.no_grad():
        outputs = teacher.to_stock()(**squares(images=IMAGE, return_tensors="pt"))
    x, y, width, height = outputs.pred_boxes[0, partner.query].tolist()
    box = [(x - width / 2) * IMAGE.width, (y - height / 2) * IMAGE.height, width * IMAGE.width, height * IMAGE.height]
    assert partner.box == pytest.approx(box, abs=1e-3)
    models, processors = {"a": teacher, "b": student}, {"a": squares, "b": processor}
    draw_attention_of(IMAGE, models, processors, tmp_path / "a.png")
    assert figures[0].axes[1].patches[0].get_bbox().bounds == pytest.approx(partner.box)
