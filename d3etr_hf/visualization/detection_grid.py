"""Detections side by side: one row an image, one column a detector.

Drawn with matplotlib's Figure objects, without pyplot and its global state.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from d3etr_hf.visualization.lettering import lettering, title_weight, written, written_names

# Okabe & Ito's palette, made to be told apart under all common kinds of colour blindness; without its black. Beyond
# seven classes the lightness changes, beyond 21 the line style does.
OKABE_ITO = ("#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#0072B2")
LIGHTNESS_STEPS = (0.0, 0.5, -0.4)
LINE_STYLES = ("solid", (0, (8, 2)), (0, (3, 2)), (0, (8, 2, 2, 2)))

# Inches. A cell is a fixed width, so a 96-pixel image is enlarged until its labels are as readable as a large one's.
CELL_WIDTH = 3.4
CELL_GAP = 0.06
TITLE_HEIGHT = 0.36
LABEL_PADDING = 1.5  # points around a label's text
MOST_LABEL_OVERLAP = 0.05  # share of a label; the box of a label that would be covered more keeps its colour only
TALLEST_CELL = 1.5 * CELL_WIDTH
DOTS_PER_INCH = 150


def class_style(label: int) -> tuple[tuple[float, float, float], str | tuple]:
    """The colour (red, green, blue in 0..1) and matplotlib line style of a class: always the same; 84 differ."""
    round_of_colours, hue = divmod(label, len(OKABE_ITO))
    round_of_shades, shade = divmod(round_of_colours, len(LIGHTNESS_STEPS))
    return shaded(OKABE_ITO[hue], LIGHTNESS_STEPS[shade]), LINE_STYLES[round_of_shades % len(LINE_STYLES)]


def shaded(colour: str, lightness: float) -> tuple[float, float, float]:
    """The colour moved towards white (`lightness` 0..1) or black (-1..0)."""
    target = 1.0 if lightness > 0 else 0.0
    red, green, blue = (channel + (target - channel) * abs(lightness) for channel in colors.to_rgb(colour))
    return red, green, blue


def draw_detection_grid(
    images: Sequence[Image.Image],
    columns: Mapping[str, Sequence[Tensor]],
    class_names: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.4,
) -> None:
    """Draws one row per image and one column per source of detections, and writes a PNG.

    Args:
        images: n images of any sizes.
        columns: title → n tensors of shape (boxes, 6): x, y, width, height in pixels of the image, score in 0..1,
            label. A score of exactly 1, as ground truth has, is not written beside the class name.
        class_names: the name of each label.
        path: the PNG to write; its folder must exist.
        score_threshold: detections below it are not drawn. In a crowd, labels that find no free place are left out,
            lowest scores first; their boxes are drawn.

    Raises:
        ValueError: no image, no column, a column of another length than `images`, rows that are not six finite
            numbers, or a label without a name.
    """
    _check_columns(images, columns)
    with lettering([*columns, *class_names]):
        _draw_grid(images, columns, class_names, path, score_threshold)


def _draw_grid(
    images: Sequence[Image.Image],
    columns: Mapping[str, Sequence[Tensor]],
    class_names: Sequence[str],
    path: str | Path,
    score_threshold: float,
) -> None:
    names = written_names(class_names)
    cell_heights = [min(CELL_WIDTH * image.height / image.width, TALLEST_CELL) for image in images]
    figure_width = len(columns) * (CELL_WIDTH + CELL_GAP) + CELL_GAP
    figure_height = TITLE_HEIGHT + sum(cell_heights) + len(images) * CELL_GAP
    figure = Figure(figsize=(figure_width, figure_height), dpi=DOTS_PER_INCH, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    top = figure_height - TITLE_HEIGHT
    for row, (image, cell_height) in enumerate(zip(images, cell_heights, strict=True)):
        for column, (title, detections_of_images) in enumerate(columns.items()):
            left, bottom = CELL_GAP + column * (CELL_WIDTH + CELL_GAP), top - cell_height
            place = left / figure_width, bottom / figure_height, CELL_WIDTH / figure_width, cell_height / figure_height
            axes = figure.add_axes(place)
            axes.imshow(image.convert("RGB"), interpolation="antialiased")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(written(title), fontsize=13, fontweight=title_weight(title), pad=5)
            rows = checked_rows(detections_of_images[row], class_names, f"column {title!r}, image {row}")
            draw_detections(axes, canvas, [entry for entry in rows if entry[4] >= score_threshold], names)
        top -= cell_height + CELL_GAP
    figure.savefig(path, format="png")


def _check_columns(images: Sequence[Image.Image], columns: Mapping[str, Sequence[Tensor]]) -> None:
    if not images or not columns:
        raise ValueError(f"{len(images)} images and {len(columns)} columns: pass at least one of each to draw a grid.")
    for title, detections_of_images in columns.items():
        if len(detections_of_images) != len(images):
            raise ValueError(
                f"column {title!r} has detections for {len(detections_of_images)} images, but there are {len(images)}."
            )


def checked_rows(detections: Tensor, class_names: Sequence[str], place: str) -> list[list[float]]:
    """Detections (n, 6) as lists, all of them finite and of classes that have a name; `place` is what errors say."""
    if detections.ndim != 2 or detections.shape[1] != 6:
        raise ValueError(
            f"{place}: detections have shape {tuple(detections.shape)}: pass (boxes, 6): x, y, width, "
            "height, score, label."
        )
    rows = detections.detach().cpu().float().tolist()
    for row in rows:
        if not all(map(math.isfinite, row)):
            raise ValueError(f"{place}: detection {row} is not finite: the model's outputs have diverged.")
        if row[4] >= 0 and not 0 <= row[5] < len(class_names):
            raise ValueError(f"{place}: label {row[5]:g} has no name: {len(class_names)} class_names were passed.")
    return rows


def draw_detections(axes: Axes, canvas: FigureCanvasAgg, rows: list[list[float]], class_names: Sequence[str]) -> None:
    """Draws boxes, large ones first, then their labels, best score first, each where it covers others least.

    Args:
        class_names: of `written_names`.
    """
    for x, y, width, height, _, label in sorted(rows, key=lambda row: -row[2] * row[3]):
        colour, line_style = class_style(int(label))
        # A full line underneath keeps the box visible on any background, and fills the gaps of a dashed one.
        lines = ((_contrast(colour), 2.8, "solid"), (colour, 1.6, line_style))
        for line_colour, line_width, style in lines:
            axes.add_patch(
                Rectangle(
                    (x, y), width, height, fill=False, edgecolor=line_colour, linewidth=line_width, linestyle=style
                )
            )

    renderer = canvas.get_renderer()
    font_size = 9.5 if len(rows) <= 8 else 8
    padding = LABEL_PADDING * DOTS_PER_INCH / 72
    cell = axes.get_window_extent(renderer)
    placed: list[Bbox] = []
    for x, y, width, height, score, label in sorted(rows, key=lambda row: -row[4]):
        colour, _ = class_style(int(label))
        name = class_names[int(label)]
        text = axes.text(
            0,
            0,
            name if score == 1 else f"{name} {score:.2f}",
            fontsize=font_size,
            color=_contrast(colour),
            bbox={"facecolor": colour, "edgecolor": "none", "pad": LABEL_PADDING},
            verticalalignment="bottom",
            zorder=3,
        )
        extent = text.get_window_extent(renderer)
        box = Bbox(axes.transData.transform([(x, y + height), (x + width, y)]))
        place = _label_place(extent.width + 2 * padding, extent.height + 2 * padding, box, cell, placed)
        if sum(_overlap(place, other) for other in placed) > MOST_LABEL_OVERLAP * place.width * place.height:
            text.remove()
            continue
        text.set_position(axes.transData.inverted().transform((place.x0 + padding, place.y0 + padding)))
        placed.append(place)


def _label_place(width: float, height: float, box: Bbox, cell: Bbox, placed: list[Bbox]) -> Bbox:
    """The place of a label at its box, inside the cell, that overlaps the labels already placed the least (pixels)."""
    best, least_overlap = None, math.inf
    for left in (box.x0, box.x1 - width):
        for bottom in (box.y1, box.y1 - height, box.y0 - height, box.y0):  # above, inside; below, inside
            left = min(max(left, cell.x0), cell.x1 - width)
            bottom = min(max(bottom, cell.y0), cell.y1 - height)
            place = Bbox.from_bounds(left, bottom, width, height)
            overlap = sum(_overlap(place, other) for other in placed)
            if overlap < least_overlap:
                best, least_overlap = place, overlap
    return best


def _overlap(first: Bbox, second: Bbox) -> float:
    common = Bbox.intersection(first, second)
    return 0.0 if common is None else common.width * common.height


def _contrast(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever stands out more against the colour (by its luma)."""
    red, green, blue = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
