"""The picture of one image with its detections, as large as the image within limits."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from d3etr_hf.visualization.detection_grid import DOTS_PER_INCH, checked_rows, draw_detections

# of a picture's longer side, pixels: labels of one size of type must be readable on small images and on large ones
SMALLEST_SIDE, LARGEST_SIDE = 600, 1600


def draw_detected_image(
    image: Image.Image, detections: Tensor, class_names: Sequence[str], path: str | Path, score_threshold: float = 0.5
) -> None:
    """Draws an image with its detections, and writes a PNG.

    Args:
        image: RGB.
        detections: (n, 6): x, y, width, height in pixels of the image, score in 0..1, label.
        class_names: the name of each label.
        path: the PNG to write; its folder must exist.
        score_threshold: detections must have a higher score to be drawn.

    Raises:
        ValueError: rows that are not six finite numbers, or a label without a name.
    """
    longest = max(image.size)
    scale = min(max(longest, SMALLEST_SIDE), LARGEST_SIDE) / longest / DOTS_PER_INCH
    # not below a pixel: of an image that is a thin line, too
    size = [max(side * scale, 1 / DOTS_PER_INCH) for side in image.size]
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image, interpolation="antialiased", aspect="auto")
    axes.set_axis_off()
    rows = checked_rows(detections, class_names, str(path))
    draw_detections(axes, canvas, [row for row in rows if row[4] > score_threshold], class_names)
    axes.set_xlim(0, image.width)
    axes.set_ylim(image.height, 0)
    figure.savefig(path, format="png")
