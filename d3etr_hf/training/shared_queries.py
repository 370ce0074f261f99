"""KD-DETR and CLoCKDistill: queries that both decoders are given, so that predictions are compared query by query.

Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling",
CVPR 2024. General queries are random ones, drawn anew every step; specific ones are the teacher's own. In every
decoder layer the loss (their equations 4 to 6) is

    sum_i w_i (class KL(p_i || p'_i) + l1 |b_i - b'_i| + giou (1 - GIoU(b_i, b'_i))) / sum_i w_i,  w_i = max_c p_i,c

of the teacher's class probabilities p and boxes b and the student's p' and b' of the same query i, which is
`prediction_distillation` with `pair_weights(..., "boxes")`: its cross-entropy is their divergence plus the teacher's
own entropy, of which no gradient comes.

CLoCKDistill (Lan & Tian, arXiv 2502.10683) makes such queries of the ground truth, so that both decoders look where an
object is and the teacher is not followed where it errs: content from an embedding of the class, position from the box,
neither of them learned. Its loss (of which we know from an account of the paper in other code) is the one above. Ours:
the embedding is N(0, 1) of the run's seed, in the teacher's width, and the box is the query's anchor, from which each
decoder makes the position as it does of its own. The paper's other half is
`losses.clockdistill_memory_distillation`.
"""

import torch

from d3etr_hf.data.sampling import Draw, drawing_from, mixed
from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.outputs import OBJECT_QUERIES, RANDOM_QUERIES, Queries, Targets
from d3etr_hf.training.distillation import Distillation


def check_shared_queries(student: Detector, teacher: Detector | OtherDetector, options: Distillation) -> None:
    """Refuse a teacher that takes no queries, random ones that would be at other places for the two, and places for
    queries that are none.

    Raises:
        IncompatibleTeacherError: the message names the model and what to set.
    """
    if not options.shared_groups:
        return
    weight = f"shared_query_weight={options.shared_query_weight}"
    if teacher.predictions_only:
        raise IncompatibleTeacherError(
            f"{weight}: the teacher, a {teacher.title}, can teach its predictions only and takes no queries; set it "
            "to 0"
        )
    roles = {"student": student, "teacher": teacher}
    for role, model in roles.items():
        if OBJECT_QUERIES in options.shared_groups and model.anchor_size == 0:
            raise IncompatibleTeacherError(
                f"{weight}, shared_object_queries=True: queries of the {role}, a {model.title}, have no anchors that "
                "could be boxes of objects; set shared_object_queries to false"
            )
    if RANDOM_QUERIES not in options.shared_groups or (student.anchor_size > 0) == (teacher.anchor_size > 0):
        return
    placed, other = sorted(roles, key=lambda role: roles[role].anchor_size == 0)
    raise IncompatibleTeacherError(
        f"{weight}, shared_random_queries={options.shared_random_queries}: the queries of the {placed}, a "
        f"{roles[placed].title}, are places, and those of the {other}, a {roles[other].title}, are not, so one random "
        "query would ask the two for different things; set shared_random_queries to 0"
    )


def random_queries(teacher: Detector, count: int, seed: int, step: int) -> Queries:
    """What any process draws for any batch of a step, float32 on the teacher's device; other draws stay as they are.

    Embeddings as the teacher's family draws its own. Where queries are places: boxes cxcywh of independent, uniform
    numbers in 0..1, of which families that take points read the centre.

    Args:
        count: N, the number of queries.
        seed: of the run.
        step: the optimizer step, from 0.
    """
    with drawing_from(mixed(seed, step, 0, Draw.RANDOM_QUERIES)):
        drawn = teacher.new_queries(count)
        content, position = drawn.content, drawn.position
        if content is None and position is None:  # boxes alone; another family may need an embedding, too
            content, position = torch.zeros(count, teacher.width), torch.randn(count, teacher.width)
        anchors = torch.rand(count, 4) if teacher.anchor_size else None
    parts = content, position, anchors
    return Queries(*(None if part is None else part.to(teacher.device) for part in parts))


def object_queries(teacher: Detector, targets: Targets, classes: int, seed: int) -> Queries:
    """A query an object, at its box and with what stands for its class; any process gives a class the same.

    Args:
        targets: the ground truth of the batch, with a place at least.
        classes: C, how many there are.
        seed: of the run.

    Returns:
        Content `(B, T, d_t)`, float32, and anchors `(B, T, 4)`, cxcywh in 0..1.
    """
    with drawing_from(mixed(seed, 0, 0, Draw.CLASS_EMBEDDING)):
        embedding = torch.randn(classes, teacher.width)
    return Queries(content=embedding.to(targets.boxes.device)[targets.class_labels], anchors=targets.boxes)
