"""The picture of where queries look: decoder cross-attention over the image, of a teacher and its student.

Drawn with matplotlib's Figure objects, without pyplot and its global state.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.models.detector import Detector
from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH, draw_detections
from d3etr_hf.visualization.detections_on_images import common_classes
from d3etr_hf.visualization.lettering import lettering, title_weight, written, written_names
from d3etr_hf.visualization.query_attention import QueryAttention, attention_of_detection

# Inches. Few layers get large cells; with many the picture keeps its width.
PICTURE_WIDTH = 15.0
WIDEST_CELL = 3.0
CELL_GAP = 0.06
HEADER_HEIGHT = 0.34  # over each cell: the model or the layer
NOTE_LINE_HEIGHT = 0.16
NOTE_CHARACTERS = 16  # to the inch, at most
TALLEST_CELL = 1.5  # times its width
PANEL_PIXELS = 600  # longest side of the images that attention is laid over: small ones would show its pixels

COLOUR_MAP = "inferno"
DIMMED = 0.6  # brightness of the grey image under the attention
NOTE = (
    "Left: an object that the detector found. Beside it, where in the image it looked to find it, layer by layer: "
    "bright where it looked most, dark where hardly at all. The percentage is the share of all its attention that "
    "falls on the brightest spot."
)
NOTE_ON_TWO = " Where the rows are alike, {second} looks for the object where {first} does."
NOTE_ON_REFERENCE = " + is the point from which it starts."


def draw_attention_of(
    image: Image.Image,
    models: Mapping[str, Detector],
    image_processors: Mapping[str, BaseImageProcessor],
    path: str | Path,
    class_names: Sequence[str] = (),
    detection: int = 0,
) -> None:
    """`attention_of_detection` and `draw_attention` in one: one model by its title, or the teacher and the student.

    Raises:
        IncompatibleTeacherError: the teacher lacks a class.
        PictureError: no such detection, or it has no partner.
    """
    *others, student = models
    teacher = others[0] if others else None
    of_student, of_teacher = attention_of_detection(
        image,
        models[student],
        image_processors[student],
        models.get(teacher),
        detection,
        image_processors.get(teacher),
    )
    attentions = {} if teacher is None else {teacher: of_teacher}
    draw_attention(image, attentions | {student: of_student}, path, class_names)


def attention_overlay(grey: np.ndarray, attention: Tensor) -> np.ndarray:
    """A dimmed image under its attention map; the stronger the attention, the more its colour covers the image.

    Args:
        grey: (height, width), 0..1.
        attention: (rows, columns), not negative; bilinearly resized to the image. Colours and covering go by the root
            of its share of its own maximum.

    Returns:
        (height, width, 3) float, 0..1.
    """
    resized = torch.nn.functional.interpolate(attention[None, None], grey.shape, mode="bilinear")[0, 0].numpy()
    # The root: one cell may draw a fifth of the attention (a sink), and the object must not vanish beside it.
    strength = np.sqrt(resized / attention.max().item())
    return (1 - strength[..., None]) * DIMMED * grey[..., None] + (
        strength[..., None] * colormaps[COLOUR_MAP](strength)[..., :3]
    )


def draw_attention(
    image: Image.Image,
    attentions: Mapping[str, QueryAttention],
    path: str | Path,
    class_names: Sequence[str] = (),
) -> None:
    """Draws one row per model, with its detection and then one panel per decoder layer, and writes a PNG.

    Args:
        image: RGB, which all attentions are of.
        attentions: title → the model's; of other depths, too.
        path: the PNG to write; its folder must exist.
        class_names: the classes whose places in the list are their colours, as in another picture.
    """
    names, (_, index) = common_classes(class_names, [each.class_name for each in attentions.values()])
    with lettering([*names, *attentions]):
        _draw_rows(image, attentions, path, written_names(names), index.tolist())


def _draw_rows(
    image: Image.Image,
    attentions: Mapping[str, QueryAttention],
    path: str | Path,
    names: list[str],
    labels: list[int],
) -> None:
    sheet = _Sheet(image, len(attentions), 1 + max(len(each.maps) for each in attentions.values()), _note(attentions))
    scale = PANEL_PIXELS / max(image.size)
    panel_size = [max(1, round(side * scale)) for side in image.size]
    grey = np.asarray(image.convert("L").resize(panel_size, Image.Resampling.BILINEAR)) / 255
    coloured = np.asarray(image.convert("RGB"))
    for row, ((title, each), label) in enumerate(zip(attentions.items(), labels, strict=True)):
        axes = sheet.add_cell(row, 0, coloured, written(title))
        draw_detections(axes, sheet.canvas, [[*each.box, each.score, label]], names)
        for layer, attention in enumerate(each.maps):
            percent = 100 * attention.max().item()
            note = f"{percent:.1f} %" if percent >= 1 else f"{percent:.2f} %"
            axes = sheet.add_cell(row, 1 + layer, attention_overlay(grey, attention), f"layer {layer + 1}", note)
            _mark(axes, each)
            axes.set_xlim(0, image.width)
            axes.set_ylim(image.height, 0)
    sheet.figure.savefig(path, format="png")


def _note(attentions: Mapping[str, QueryAttention]) -> str:
    has_point = any(each.reference_point is not None for each in attentions.values())
    titles = list(attentions)
    of_two = NOTE_ON_TWO.format(first=titles[0], second=titles[1]) if len(titles) == 2 else ""
    return NOTE + of_two + NOTE_ON_REFERENCE * has_point


def _mark(axes: Axes, attention: QueryAttention) -> None:
    """The box, and the reference point where there is one: white, with a black rim."""
    x, y, width, height = attention.box
    for colour, size in (("black", 2.2), ("white", 1.0)):
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=size))
        if attention.reference_point is not None:
            axes.plot(*attention.reference_point, "+", color=colour, markersize=7, markeredgewidth=size)


class _Sheet:
    """A figure of rows and columns of cells in the image's proportions, each under a header, above a note."""

    def __init__(self, image: Image.Image, rows: int, columns: int, note: str):
        self.image = image
        self.cell_width = min(WIDEST_CELL, PICTURE_WIDTH / columns)
        self.cell_height = self.cell_width * min(image.height / image.width, TALLEST_CELL)
        self.width = columns * (self.cell_width + CELL_GAP) + CELL_GAP
        note_lines = textwrap.wrap(note, int(self.width * NOTE_CHARACTERS))
        self.height = rows * (HEADER_HEIGHT + self.cell_height) + (0.5 + len(note_lines)) * NOTE_LINE_HEIGHT
        self.figure = Figure(figsize=(self.width, self.height), dpi=DOTS_PER_INCH, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        place = CELL_GAP / self.width, 0.3 * NOTE_LINE_HEIGHT / self.height
        self.figure.text(*place, "\n".join(note_lines), fontsize=8, color="0.35", va="bottom")

    def add_cell(self, row: int, column: int, pixels: np.ndarray, title: str, note: str = "") -> Axes:
        """Pixels over the whole image's extent, with a title that fits and a note at the right of it."""
        left = CELL_GAP + column * (self.cell_width + CELL_GAP)
        bottom = self.height - (row + 1) * (HEADER_HEIGHT + self.cell_height)
        size = self.cell_width / self.width, self.cell_height / self.height
        axes = self.figure.add_axes((left / self.width, bottom / self.height, *size))
        axes.imshow(pixels, extent=(0, self.image.width, self.image.height, 0), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
        text = axes.set_title(
            title, loc="left", fontsize=11, pad=4, fontweight="normal" if column else title_weight(title)
        )
        room = self.cell_width * DOTS_PER_INCH / text.get_window_extent(self.canvas.get_renderer()).width
        text.set_fontsize(11 * min(1.0, room))
        axes.set_title(note, loc="right", fontsize=9, pad=4, color="0.35")
        return axes
