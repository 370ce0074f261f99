"""Where a query looks: decoder cross-attention over the image, layer by layer, of a teacher and its student.

Drawn with matplotlib's Figure objects, without pyplot and its global state.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from d3etr_hf.errors import PictureError
from d3etr_hf.matching import AdaptiveMatcher
from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.loading import class_names_of
from d3etr_hf.outputs import DetectorOutput, GroupOutput
from d3etr_hf.training.teacher import check_image_processors, class_index_by_name
from d3etr_hf.visualization.pictures import DOTS_PER_INCH, draw_detections
from d3etr_hf.visualization.visualisation import common_classes, prepare_batch

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
    "Colour: where the query of this detection looks (cross-attention, mean over heads), the root of its share of "
    "the panel's maximum, which is the share of one memory cell.   +  reference point"
)


@dataclass(frozen=True)
class QueryAttention:
    """One detection of one model, and where its query looked for it.

    Attributes:
        query: its place among the model's object queries.
        class_name: of the model's own classes.
        score: 0..1.
        box: x, y, width, height in pixels of the image.
        reference_point: x, y in pixels of the image, from which Conditional DETR's query starts.
        maps: (L, rows, columns) float32, per decoder layer the share of attention in each memory cell of the unpadded
            image, mean over heads; each layer sums to one.
    """

    query: int
    class_name: str
    score: float
    box: tuple[float, float, float, float]
    reference_point: tuple[float, float]
    maps: Tensor


@torch.no_grad()
def attention_of_detection(
    image: Image.Image,
    student: D3etrConditionalDetrForObjectDetection,
    image_processor: BaseImageProcessor,
    teacher: D3etrConditionalDetrForObjectDetection | None = None,
    detection: int = 0,
    matcher: AdaptiveMatcher | None = None,
) -> tuple[QueryAttention, QueryAttention | None]:
    """The attention of a student's detection, and of the teacher's query that adaptive matching gives it.

    Args:
        image: RGB.
        student, teacher: they run where they are, and are left in eval mode.
        image_processor: the student's; as in distillation both models see its pixels.
        detection: which of the student's detections in the order of their scores; 0 is the highest.
        matcher: with the weights of its costs; by default the method's. The last decoder layers are matched.

    Returns:
        The student's, and the teacher's (None without a teacher), whose class is the teacher's own best one.

    Raises:
        PictureError: there is no such detection, or no teacher query is matched with its query.
        IncompatibleTeacherError: the teacher lacks a class of the student.
        NonFiniteCostError: a prediction is not finite.
    """
    batch = prepare_batch(image_processor, [image])
    output = _forward(student, batch)
    logits = output.groups[0].logits[-1, 0]
    if not 0 <= detection < logits.numel():
        raise PictureError(
            f"detection is {detection}: the student has detections 0..{logits.numel() - 1} in the order of their "
            f"scores ({logits.shape[0]} queries × {logits.shape[1]} classes)"
        )
    order = logits.float().flatten().argsort(descending=True, stable=True)
    query, label = divmod(order[detection].item(), logits.shape[1])
    of_student = _query_attention(student, output, query, label, image)
    if teacher is None:
        return of_student, None
    output_of_teacher = _forward(teacher, batch)
    class_index = class_index_by_name(teacher.config, class_names_of(student.config)).to(logits.device)
    partners = partner_queries(output_of_teacher, output, class_index, matcher or AdaptiveMatcher())
    if query not in partners:
        matched = [rank for rank, pair in enumerate(order.tolist()) if pair // logits.shape[1] in partners]
        raise PictureError(
            f"detection {detection} (query {query} of the student) has no partner: the teacher has "
            f"{len(partners)} queries for the student's {len(logits)}; choose detection {matched[0]}, for example"
        )
    partner = partners[query]
    label_of_teacher = output_of_teacher.groups[0].logits[-1, 0, partner].argmax().item()
    return of_student, _query_attention(teacher, output_of_teacher, partner, label_of_teacher, image)


def partner_queries(
    teacher: DetectorOutput, student: DetectorOutput, class_index: Tensor, matcher: AdaptiveMatcher
) -> dict[int, int]:
    """The teacher's query for each matched query of the student, by the predictions of the last decoder layers.

    Args:
        teacher, student: outputs for one and the same image.
        class_index: int64 (C,), the teacher's class for each of the student's.
    """
    of_teacher, of_student = teacher.groups[0], student.groups[0]
    pairs = matcher(
        GroupOutput(logits=of_teacher.logits[-1:, :, :, class_index], boxes=of_teacher.boxes[-1:]),
        GroupOutput(logits=of_student.logits[-1:], boxes=of_student.boxes[-1:]),
    )
    return dict(zip(pairs.student[0, 0].tolist(), pairs.teacher[0, 0].tolist(), strict=True))


def memory_maps(output: DetectorOutput, image: int, query: int) -> Tensor:
    """The cross-attention of one query to the memory cells of the unpadded image.

    Args:
        output: with cross-attention maps.
        image, query: their places in the batch and in the model's own group.

    Returns:
        (L, rows, columns) float32 on the CPU, mean over heads.
    """
    mask = output.memory_mask[image]
    rows, columns = mask.any(1).sum(), mask.any(0).sum()
    maps = torch.stack([layer.probability[image, :, query].mean(0) for layer in output.groups[0].cross_attention])
    return maps.unflatten(-1, mask.shape)[:, :rows, :columns].float().cpu()


def _forward(model: D3etrConditionalDetrForObjectDetection, batch: dict[str, Tensor]) -> DetectorOutput:
    pixels, mask = (batch[name].to(model.device) for name in ("pixel_values", "pixel_mask"))
    return model.eval()(pixels.to(model.dtype), mask, return_groups=True, return_cross_attention=True)


def _query_attention(
    model: D3etrConditionalDetrForObjectDetection, output: DetectorOutput, query: int, label: int, image: Image.Image
) -> QueryAttention:
    group = output.groups[0]
    centre_x, centre_y, width, height = group.boxes[-1, 0, query].float().tolist()
    position = model.model.query_position_embeddings.weight[query]
    point_x, point_y = model.model.decoder.ref_point_head(position).sigmoid().float().tolist()
    return QueryAttention(
        query=query,
        class_name=model.config.id2label[label],
        score=group.logits[-1, 0, query, label].float().sigmoid().item(),
        box=(
            (centre_x - width / 2) * image.width,
            (centre_y - height / 2) * image.height,
            width * image.width,
            height * image.height,
        ),
        reference_point=(point_x * image.width, point_y * image.height),
        maps=memory_maps(output, 0, query),
    )


def draw_attention_of(
    image: Image.Image,
    models: Mapping[str, D3etrConditionalDetrForObjectDetection],
    image_processors: Mapping[str, BaseImageProcessor],
    path: str | Path,
    class_names: Sequence[str] = (),
    detection: int = 0,
) -> None:
    """`attention_of_detection` and `draw_attention` in one: one model by its title, or the teacher and the student.

    Raises:
        IncompatibleTeacherError: the two see pixels of other scales, or the teacher lacks a class.
        PictureError: no such detection, or it has no partner.
    """
    *teacher, student = models
    check_image_processors(image_processors[student], image_processors[teacher[0]] if teacher else None)
    of_student, of_teacher = attention_of_detection(
        image, models[student], image_processors[student], models[teacher[0]] if teacher else None, detection
    )
    attentions = {teacher[0]: of_teacher} if teacher else {}
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
    columns = 1 + max(len(each.maps) for each in attentions.values())
    cell_width = min(WIDEST_CELL, PICTURE_WIDTH / columns)
    cell_height = cell_width * min(image.height / image.width, TALLEST_CELL)
    width = columns * (cell_width + CELL_GAP) + CELL_GAP
    note_lines = textwrap.wrap(NOTE, int(width * NOTE_CHARACTERS))
    height = len(attentions) * (HEADER_HEIGHT + cell_height) + (0.5 + len(note_lines)) * NOTE_LINE_HEIGHT
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def add_cell(row: int, column: int, pixels: np.ndarray, title: str, note: str = "") -> Axes:
        left = CELL_GAP + column * (cell_width + CELL_GAP)
        bottom = height - (row + 1) * (HEADER_HEIGHT + cell_height)
        axes = figure.add_axes((left / width, bottom / height, cell_width / width, cell_height / height))
        axes.imshow(pixels, extent=(0, image.width, image.height, 0), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
        text = axes.set_title(title, loc="left", fontsize=11, pad=4, fontweight="normal" if column else "bold")
        room = cell_width * DOTS_PER_INCH / text.get_window_extent(canvas.get_renderer()).width
        text.set_fontsize(11 * min(1.0, room))
        axes.set_title(note, loc="right", fontsize=9, pad=4, color="0.35")
        return axes

    scale = PANEL_PIXELS / max(image.size)
    panel_size = [max(1, round(side * scale)) for side in image.size]
    grey = np.asarray(image.convert("L").resize(panel_size, Image.Resampling.BILINEAR)) / 255
    coloured = np.asarray(image.convert("RGB"))
    for row, ((title, each), label) in enumerate(zip(attentions.items(), index.tolist(), strict=True)):
        axes = add_cell(row, 0, coloured, title)
        draw_detections(axes, canvas, [[*each.box, each.score, label]], names)
        for layer, attention in enumerate(each.maps):
            percent = 100 * attention.max().item()
            note = f"max {percent:.1f} %" if percent >= 1 else f"max {percent:.2f} %"
            axes = add_cell(row, 1 + layer, attention_overlay(grey, attention), f"layer {layer + 1}", note)
            x, y, box_width, box_height = each.box
            for colour, size in (("black", 2.2), ("white", 1.0)):
                axes.add_patch(Rectangle((x, y), box_width, box_height, fill=False, edgecolor=colour, linewidth=size))
                axes.plot(*each.reference_point, "+", color=colour, markersize=7, markeredgewidth=size)
            axes.set_xlim(0, image.width)
            axes.set_ylim(image.height, 0)
    bottom = 0.3 * NOTE_LINE_HEIGHT / height
    figure.text(CELL_GAP / width, bottom, "\n".join(note_lines), fontsize=8, color="0.35", va="bottom")
    figure.savefig(path, format="png")
