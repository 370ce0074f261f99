"""Images with their annotated boxes, several beside each other: whether boxes lie where the objects are."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d3etr_hf.data import DetectionDataset
from d3etr_hf.visualization.detection_grid import CELL_GAP, CELL_WIDTH, DOTS_PER_INCH, TITLE_HEIGHT, draw_detections
from d3etr_hf.visualization.detections_on_images import ground_truth_rows
from d3etr_hf.visualization.lettering import lettering, written, written_names

COLUMNS = 4


def draw_annotations(examples: Sequence[tuple[DetectionDataset, int]], path: str | Path) -> None:
    """Draws images of data sets of the same classes with their boxes, four beside each other, and writes a PNG.

    Args:
        examples: data sets without transform, and which of their rows; at least one.
        path: the PNG to write; its folder must exist.

    Raises:
        DatasetError: an image cannot be read.
    """
    class_names = examples[0][0].class_names
    columns = min(COLUMNS, len(examples))
    cell_height = TITLE_HEIGHT + CELL_WIDTH
    width = columns * (CELL_WIDTH + CELL_GAP) + CELL_GAP
    height = math.ceil(len(examples) / columns) * cell_height + CELL_GAP
    titles = [f"{dataset.name}, image {dataset.rows[index]['image_id']}" for dataset, index in examples]
    with lettering([*titles, *class_names]):
        names = written_names(class_names)
        figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        for place, (dataset, index) in enumerate(examples):
            row, column = divmod(place, columns)
            left, bottom = CELL_GAP + column * (CELL_WIDTH + CELL_GAP), height - (row + 1) * cell_height
            axes = figure.add_axes((left / width, bottom / height, CELL_WIDTH / width, CELL_WIDTH / height))
            example = dataset[index]
            axes.imshow(example["image"], interpolation="antialiased")
            axes.set_axis_off()
            axes.set_title(written(titles[place])[-40:], fontsize=9, pad=4)
            draw_detections(axes, canvas, ground_truth_rows(example["target"]).tolist(), names)
        figure.savefig(path, format="png")
