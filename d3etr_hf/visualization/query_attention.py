"""Where the query of a detection looks: a student's, and that of the teacher's query that it is matched with."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.image_sizes import differing_setting
from d3etr_hf.errors import PictureError
from d3etr_hf.evaluation.image_detections import ImagesForModel
from d3etr_hf.matching import AdaptiveMatcher, TaughtGroup
from d3etr_hf.models.detector import Detector
from d3etr_hf.outputs import OWN, DetectorOutput, GroupOutput, GroupRequest, Queries, SampledAttention
from d3etr_hf.training.teacher import class_index_by_name


@dataclass(frozen=True)
class QueryAttention:
    """One detection of one model, and where its query looked for it.

    Attributes:
        query: its place among the model's object queries.
        class_name: of the model's own classes.
        score: 0..1.
        box: x, y, width, height in pixels of the image.
        maps: (L, rows, columns) float32, per decoder layer the share of attention in each memory cell of the unpadded
            image, mean over heads; each layer sums to one.
        reference_point: x, y in pixels of the image, the anchor that the query starts from; None in a family without.
    """

    query: int
    class_name: str
    score: float
    box: tuple[float, float, float, float]
    maps: Tensor
    reference_point: tuple[float, float] | None = None


@torch.no_grad()
def attention_of_detection(
    image: Image.Image,
    student: Detector,
    image_processor: BaseImageProcessor,
    teacher: Detector | None = None,
    detection: int = 0,
    teacher_processor: BaseImageProcessor | None = None,
) -> tuple[QueryAttention, QueryAttention | None]:
    """The attention of a student's detection, and of the teacher's query that adaptive matching gives it.

    Matched are the predictions of the last decoder layers, with the method's weights.

    Args:
        image: RGB.
        student, teacher: they run where they are, and are left in eval mode.
        image_processor: the student's.
        detection: which of the student's detections in the order of their scores; 0 is the highest.
        teacher_processor: the teacher's; where it makes pixels in the student's way, the teacher sees the student's.

    Returns:
        The student's, and the teacher's (None without one), whose class is the teacher's own best one.

    Raises:
        PictureError: there is no such detection, or no teacher query is matched with its query.
        IncompatibleTeacherError: the teacher lacks a class of the student.
        NonFiniteCostError: a prediction is not finite.
    """
    output = _forward(student, image, image_processor)
    ranked = _ranked(student, output)
    if not 0 <= detection < len(ranked):
        raise PictureError(
            f"detection is {detection}: the student has detections 0..{len(ranked) - 1} in the order of their "
            f"scores, of its {student.query_count} queries"
        )
    query, label = ranked[detection]
    of_student = _query_attention(student, output, query, label, image)
    if teacher is None:
        return of_student, None
    output_of_teacher = _forward(teacher, image, _taught_with(image_processor, teacher_processor))
    taught = _last_layer(teacher, output_of_teacher, student.class_names)
    partners = partner_queries(taught, output.groups[OWN], AdaptiveMatcher(student.criterion().scores))
    if query not in partners:
        matched = next(rank for rank, (other, _) in enumerate(ranked) if other in partners)
        raise PictureError(
            f"detection {detection} (query {query} of the student) has no partner: the teacher has "
            f"{len(partners)} queries for the student's {student.query_count}; choose detection {matched}, for example"
        )
    partner = partners[query]
    best = next(label for other, label in _ranked(teacher, output_of_teacher) if other == partner)
    return of_student, _query_attention(teacher, output_of_teacher, partner, best, image)


def _last_layer(teacher: Detector, output: DetectorOutput, class_names: list[str]) -> TaughtGroup:
    """A teacher's predictions in its last decoder layer, for these classes."""
    group = output.groups[OWN]
    probabilities = teacher.criterion().scores.probabilities(group.logits[-1:])
    class_index = class_index_by_name(teacher, class_names).to(probabilities.device)
    return TaughtGroup(probabilities=probabilities[..., class_index], boxes=group.boxes[-1:])


def partner_queries(teacher: TaughtGroup, student: GroupOutput, matcher: AdaptiveMatcher) -> dict[int, int]:
    """The teacher's query for each matched query of the student, by the predictions of the last decoder layers.

    Args:
        teacher, student: outputs for one and the same image; of the student's layers only the last is read.
    """
    last = GroupOutput(logits=student.logits[-1:], boxes=student.boxes[-1:])
    pairs = matcher(TaughtGroup(teacher.probabilities[-1:], teacher.boxes[-1:]), last)
    return dict(zip(pairs.student[0, 0].tolist(), pairs.teacher[0, 0].tolist(), strict=True))


def memory_maps(output: DetectorOutput, image: int, query: int) -> Tensor:
    """The cross-attention of one query to the memory cells of the unpadded image.

    Args:
        output: with cross-attention, dense or sampled.
        image, query: their places in the batch and in the model's own group.

    Returns:
        (L, rows, columns) float32 on the CPU, mean over heads.
    """
    mask, layers = output.memory_mask, output.groups[OWN].cross_attention
    dense = [layer.on_grid(mask) if isinstance(layer, SampledAttention) else layer for layer in layers]
    maps = torch.stack([layer.probability[image, :, query].mean(0) for layer in dense])
    rows, columns = mask[image].any(1).sum(), mask[image].any(0).sum()
    return maps.unflatten(-1, mask[image].shape)[:, :rows, :columns].float().cpu()


def _taught_with(student: BaseImageProcessor, teacher: BaseImageProcessor | None) -> BaseImageProcessor:
    """The image processor whose pixels the teacher sees."""
    return student if teacher is None or differing_setting(student, teacher) is None else teacher


def _forward(model: Detector, image: Image.Image, image_processor: BaseImageProcessor) -> DetectorOutput:
    batch = DetectionCollator()([ImagesForModel([image], ["the image"], image_processor)[0]])
    pixels, mask = (batch[name].to(model.device) for name in ("pixel_values", "pixel_mask"))
    return model.eval()(pixels.to(model.dtype), mask, request=GroupRequest(cross_attention=True))


def _ranked(model: Detector, output: DetectorOutput) -> list[tuple[int, int]]:
    """Query and class of every detection of the one image, best score first."""
    ranking = model.criterion().scores.ranking(output.groups[OWN].logits[-1, 0])
    values, order = ranking.flatten().sort(descending=True, stable=True)
    return [divmod(pair, ranking.shape[-1]) for pair in order[values > -torch.inf].tolist()]


def _query_attention(
    model: Detector, output: DetectorOutput, query: int, label: int, image: Image.Image
) -> QueryAttention:
    group = output.groups[OWN]
    centre_x, centre_y, width, height = group.boxes[-1, 0, query].float().tolist()
    corner = centre_x - width / 2, centre_y - height / 2
    return QueryAttention(
        query=query,
        class_name=model.class_names[label],
        score=model.criterion().scores.probabilities(group.logits[-1, 0, query])[label].item(),
        box=(corner[0] * image.width, corner[1] * image.height, width * image.width, height * image.height),
        maps=memory_maps(output, 0, query),
        reference_point=_reference_point(output.queries, query, image),
    )


def _reference_point(queries: Queries, query: int, image: Image.Image) -> tuple[float, float] | None:
    if queries.anchors is None:
        return None
    anchors = queries.anchors if queries.anchors.dim() == 2 else queries.anchors[0]
    x, y = anchors[query, :2].float().tolist()
    return x * image.width, y * image.height
