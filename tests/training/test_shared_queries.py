"""Queries that a teacher and its student share: how they are drawn, who takes them, who is refused."""

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.query_adapters import QueryAdapter
from d3etr_hf.outputs import OBJECT_QUERIES, RANDOM_QUERIES, GroupRequest
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.shared_queries import check_shared_queries, object_queries, random_queries
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.tiny import random_labels, targets_of, tiny_model

PIXELS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
OBJECTS = targets_of(random_labels([3, 2], seed=4))
ALONE = {"self_attention_weight": 0.0, "cross_attention_weight": 0.0, "prediction_weight": 0.0}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


def parts_of(queries) -> list[torch.Tensor]:
    return [part for part in (queries.content, queries.position, queries.anchors) if part is not None]


def test_random_queries_are_known_from_seed_and_step():
    """Every process draws the same for all batches of a step, others the next; what dropout draws stays as it is."""
    teacher = tiny_model()
    before = torch.get_rng_state()
    first = parts_of(random_queries(teacher, 400, seed=5, step=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = parts_of(random_queries(teacher, 400, seed=5, step=3))
    assert len(first) == 2 and all(map(torch.equal, first, again))
    for seed, step in ((5, 4), (6, 3)):
        others = parts_of(random_queries(teacher, 400, seed, step))
        assert not any(map(torch.equal, first, others))
    boxes = first[1]
    assert boxes.shape == (400, 4) and 0 <= boxes.min() and boxes.max() <= 1
    assert (boxes.mean(0) - 0.5).abs().max() < 0.06 and (boxes.std(0) - 12**-0.5).abs().max() < 0.03


def accepted(student, teacher) -> bool:
    try:
        check_shared_queries(student, teacher, Distillation(shared_query_weight=1.0))
    except IncompatibleTeacherError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_what_every_other_draws(family):
    """Or is refused: models whose queries are no places, and those whose are, have no random query in common."""
    student = tiny_model(2, family)
    for of_teacher in FAMILIES:
        teacher = (
            tiny_model(1, of_teacher, d_model=48) if of_teacher == "conditional_detr" else tiny_model(1, of_teacher)
        )
        if not accepted(student, teacher):
            assert {family, of_teacher} & {"detr", "table-transformer"}
            continue
        queries = {RANDOM_QUERIES: random_queries(teacher, 5, seed=1, step=0)}
        if teacher.anchor_size > 0:
            queries[OBJECT_QUERIES] = object_queries(teacher, OBJECTS, 3, seed=1)
        student.query_adapters.update(dict.fromkeys(queries, QueryAdapter(teacher.width, student.width)))
        with torch.no_grad():
            groups = student(PIXELS, request=GroupRequest(queries, masks={OBJECT_QUERIES: OBJECTS.visible})).groups
        for name, asked in queries.items():
            group = groups[name]
            assert group.boxes.shape == (3, 2, len(asked), 4) and group.logits.isfinite().all()
            assert (group.boxes[:, :, 0] - group.boxes[:, :, 1]).abs().max() > 1e-4


def test_a_class_is_the_same_on_every_process():
    """Whatever the batch and whatever was drawn before: each query is its class's, at its object's box."""
    teacher, labels = tiny_model(), random_labels([4, 2], seed=3)
    queries = object_queries(teacher, targets_of(labels), 3, seed=5)
    torch.rand(3)
    alone = object_queries(teacher, targets_of(labels[1:]), 3, seed=5)
    assert torch.equal(queries.content[1, :2], alone.content[0]) and torch.equal(alone.anchors[0], labels[1]["boxes"])
    classes = labels[0]["class_labels"]
    same = (queries.content[0, :, None] == queries.content[0]).all(-1)
    assert torch.equal(same, classes[:, None] == classes) and 0 < (~same).sum()
    assert not torch.equal(object_queries(teacher, targets_of(labels), 3, seed=6).content, queries.content)


def test_what_has_no_queries_in_common_is_refused(shapes, tmp_path):
    plain, placed = tiny_model(1, "detr"), tiny_model(2)
    for student, teacher in ((plain, placed), (placed, plain)):
        with pytest.raises(IncompatibleTeacherError, match="Conditional DETR, are places, .*a DETR, are not.*to 0"):
            shapes_trainer(shapes, tmp_path, student=student, teacher=teacher, shared_query_weight=1.0)
    own = Distillation(shared_query_weight=1.0, shared_random_queries=0)
    objects = {"shared_query_weight": 1.0, "shared_random_queries": 0, "shared_object_queries": True}
    for student, teacher in ((plain, placed), (placed, plain), (plain, plain)):
        with pytest.raises(IncompatibleTeacherError, match="shared_object_queries=True: .*a DETR, have no anchors"):
            check_shared_queries(student, teacher, Distillation(**objects))
    check_shared_queries(placed, plain, own)  # its own queries are taken as an auxiliary group's are


def test_only_what_both_decode_is_learned(shapes, tmp_path):
    """A student that is its teacher already says of all its queries what the teacher says; its other terms are off."""
    options = {"auxiliary_queries": "none", "detection_weight": 0.0, "shared_query_weight": 1.0, **ALONE}
    options |= {
        "shared_random_queries": 6,
        "shared_object_queries": True,
        "max_steps": 1,
        "distillation_class_weight": 0.0,
    }
    values = []
    for seed in (1, 2):
        trainer = shapes_trainer(
            shapes, tmp_path / str(seed), student=tiny_model(seed), teacher=tiny_model(1), **options
        )
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        names = {name for name in log if name.startswith("loss/")}
        assert names == {f"loss/{name}/shared_query" for name in (RANDOM_QUERIES, "teacher_queries", "object_queries")}
        values.append([log[name] for name in names])
    assert max(values[0]) < 1e-4 < 0.1 < min(values[1])
