"""Detections side by side: pixels where boxes, labels and colours belong."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from d3etr_hf.visualization import detection_grid
from d3etr_hf.visualization.detection_grid import class_style, draw_detection_grid
from tests.visualization.drawn import pixels_of

# What a protanope and a deuteranope see of linear red, green, blue (Machado, Oliveira, Fernandes 2009, severity 1).
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


def grey_image(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


def draw(tmp_path, images, columns, class_names=("cat", "dog", "bird"), **options):
    path = tmp_path / "grid.png"
    draw_detection_grid(images, columns, class_names, path, **options)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def box(label, score=1.0, x=20.0, y=30.0, width=40.0, height=50.0):
    return torch.tensor([[x, y, width, height, score, label]])


NOTHING = torch.zeros(0, 6)


def test_one_row_per_image_and_one_column_per_title(tmp_path):
    """Guards against a transposed grid, and against cells that ignore their image's aspect ratio."""
    dots = detection_grid.DOTS_PER_INCH
    square, wide = grey_image(96, 96), grey_image(640, 320)
    heights, widths = {}, {}
    for row_count, column_count in itertools.product((1, 2), (1, 3)):
        columns = {f"column {index}": [NOTHING] * row_count for index in range(column_count)}
        heights[row_count], widths[column_count], _ = draw(tmp_path, [square, wide][:row_count], columns).shape
    cell = detection_grid.CELL_WIDTH * dots
    assert heights[2] - heights[1] == pytest.approx(cell / 2 + detection_grid.CELL_GAP * dots, abs=2)
    assert widths[3] - widths[1] == pytest.approx(2 * (cell + detection_grid.CELL_GAP * dots), abs=2)
    assert heights[1] > cell  # 96 pixels are enlarged


def test_boxes_lie_where_their_pixels_say(tmp_path):
    """Guards against xyxy taken for xywh, a flipped axis and a detection in another image's cell."""
    images = [grey_image(200, 100), grey_image(100, 100)]
    rows = box(0, x=100, y=50, width=60, height=40)
    picture = draw(tmp_path, images, {"teacher": [NOTHING, NOTHING], "distilled": [rows, NOTHING]}, class_names=[" "])
    dots = detection_grid.DOTS_PER_INCH
    scale = detection_grid.CELL_WIDTH * dots / 200
    left = (2 * detection_grid.CELL_GAP + detection_grid.CELL_WIDTH) * dots
    top = detection_grid.TITLE_HEIGHT * dots
    found_rows, found_columns = pixels_of(picture, class_style(0)[0])
    assert found_columns.min() == pytest.approx(left + 100 * scale, abs=4)
    assert found_columns.max() == pytest.approx(left + 160 * scale, abs=4)
    assert found_rows.max() == pytest.approx(top + 90 * scale, abs=4)
    # The label, a blank here, lies on top of the box.
    assert top + 35 * scale < found_rows.min() < top + 51 * scale


def test_a_class_keeps_its_colour_over_columns_and_calls(tmp_path):
    """Guards against colours by order of appearance: a class absent in one column would shift the others."""
    image = grey_image(96, 96)
    both = torch.cat([box(0, x=5, y=30, width=30), box(2, x=55, y=30, width=30)])
    for columns in ({"teacher": [both], "distilled": [box(2)]}, {"distilled": [box(2)], "teacher": [both]}):
        picture = draw(tmp_path, [image], columns)
        half = picture.shape[1] // 2
        halves = dict(zip(columns, (picture[:, :half], picture[:, half:]), strict=True))
        assert pixels_of(halves["teacher"], class_style(0)[0])[0].size > 100
        assert pixels_of(halves["teacher"], class_style(2)[0])[0].size > 100
        assert pixels_of(halves["distilled"], class_style(2)[0])[0].size > 100
        assert pixels_of(halves["distilled"], class_style(0)[0])[0].size == 0


def test_eighty_classes_have_eighty_looks():
    assert len({class_style(label) for label in range(80)}) == 80
    assert class_style(84) == class_style(0)


@pytest.mark.parametrize("seen", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["all", "protanopia", "deuteranopia"])
def test_the_first_classes_differ_for_the_colour_blind(seen):
    """Guards against a palette of hues evenly spread: its reds and greens merge for one man in twelve."""

    def appearance(colour):
        colour = np.array(colour)
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return np.clip(seen @ linear, 0, 1) ** (1 / 2.2)

    looks = [appearance(class_style(label)[0]) for label in range(7)]
    distances = [np.linalg.norm(first - second) for first, second in itertools.combinations(looks, 2)]
    assert min(distances) > 0.12


def test_the_score_threshold_hides_weak_detections(tmp_path):
    rows = torch.cat([box(0, score=0.6), box(1, score=0.3)])
    weak = class_style(1)[0]
    assert pixels_of(draw(tmp_path, [grey_image(96, 96)], {"student": [rows]}), weak)[0].size == 0
    assert pixels_of(draw(tmp_path, [grey_image(96, 96)], {"student": [rows]}, score_threshold=0.2), weak)[0].size > 0


def test_ground_truth_is_labelled_without_a_score(tmp_path):
    """A one on every box of the ground truth would be read as a model's certainty."""

    def label_width(score):
        picture = draw(tmp_path, [grey_image(300, 300)], {"column": [box(0, score, x=100, y=100, width=4, height=4)]})
        columns = pixels_of(picture, class_style(0)[0])[1]
        return np.ptp(columns)

    assert 20 < label_width(1.0) < label_width(0.99) - 30


def test_in_a_crowd_a_label_without_a_free_place_is_left_out(tmp_path):
    """Labels written over each other cannot be read; the best scores keep theirs."""
    crowd = torch.cat([box(1, score=0.5), *(box(0, score=0.9) for _ in range(12))])
    picture = draw(tmp_path, [grey_image(96, 96)], {"teacher": [crowd]})
    assert pixels_of(picture, class_style(0)[0])[0].size > 1000
    assert pixels_of(picture, class_style(1)[0])[0].size == 0  # its box lies under the others


@pytest.mark.parametrize("corner", [(0, 0), (92, 0), (0, 92), (92, 92)])
def test_labels_stay_inside_their_cell(tmp_path, corner):
    """Guards against labels that run into the titles, the neighbouring column or out of the picture."""
    rows = box(0, 0.5, *corner, width=4, height=4)
    columns = {"left": [NOTHING] * 3, "middle": [NOTHING, rows, NOTHING], "right": [NOTHING] * 3}
    picture = draw(tmp_path, [grey_image(96, 96)] * 3, columns, class_names=["a long class name"])
    found_rows, found_columns = pixels_of(picture, class_style(0)[0])
    dots, step = detection_grid.DOTS_PER_INCH, detection_grid.CELL_WIDTH + detection_grid.CELL_GAP
    left, top = (detection_grid.CELL_GAP + step) * dots, (detection_grid.TITLE_HEIGHT + step) * dots
    cell = detection_grid.CELL_WIDTH * dots
    assert left - 1 <= found_columns.min() and found_columns.max() <= left + cell + 1
    assert top - 1 <= found_rows.min() and found_rows.max() <= top + cell + 1
    assert found_columns.size > 1000


def test_images_of_any_mode_and_no_detections(tmp_path):
    images = [Image.new("L", (50, 80), 100), Image.new("RGBA", (80, 50)), Image.new("RGB", (20, 2000))]
    picture = draw(tmp_path, images, {"ground truth": [NOTHING] * 3, "distilled": [NOTHING] * 3})
    tallest = detection_grid.TALLEST_CELL * detection_grid.DOTS_PER_INCH
    assert picture.shape[0] < 3.2 * tallest  # a very tall image does not stretch the picture


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "0 columns"),
        ({"teacher": [NOTHING, NOTHING]}, "column 'teacher' has detections for 2 images, but there are 1"),
        ({"teacher": [torch.zeros(3, 5)]}, r"column 'teacher', image 0: detections have shape \(3, 5\)"),
        ({"teacher": [box(0, x=float("nan"))]}, r"column 'teacher', image 0: detection \[nan, .*not finite"),
        ({"teacher": [box(3)]}, "column 'teacher', image 0: label 3 has no name"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path, [grey_image(96, 96)], columns)


def test_pyplot_is_not_touched(fresh_processes):
    """pyplot keeps every figure alive and may ask for a display."""
    result = fresh_processes.code(
        "import sys; assert 'matplotlib.pyplot' not in sys.modules\n"
        "import d3etr_hf.visualization.run_pictures; assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr
