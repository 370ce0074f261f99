"""The query groups of a step: how many queries each has, and for which seed and step they are drawn."""

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.outputs import AUXILIARY, ONE_TO_MANY, OWN, RANDOM_QUERIES
from d3etr_hf.training import step_queries
from d3etr_hf.training.denoising import NOISED, noised_queries
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.shared_queries import random_queries
from d3etr_hf.training.step_queries import StepQueries
from d3etr_hf.training.teacher import Teacher
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.tiny import random_labels, targets_of, tiny_model


@pytest.fixture(scope="module")
def models():
    """A student of 7 queries under a teacher of 9."""
    student, teacher = tiny_model(seed=2), tiny_model(seed=1, num_queries=9)
    return student, Teacher(teacher, student.class_names, student.decoder_depth)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {OWN: 7, AUXILIARY: 9}),
        ({"auxiliary_queries": "learned", "auxiliary_groups": 2}, {OWN: 7, AUXILIARY: 7, f"{AUXILIARY}_2": 7}),
        # of five objects, each asked for three times, eight queries hold two and two thirds
        (
            {"auxiliary_queries": "none", "one_to_many_queries": 8, "one_to_many_repeats": 3},
            {OWN: 7, ONE_TO_MANY: pytest.approx(8 / 3)},
        ),
    ],
)
def test_group_sizes(models, options, expected):
    assert StepQueries(*models, Distillation(**options), seed=3).group_sizes() == expected


def test_queries_are_of_their_seed_and_step(models):
    options = Distillation(shared_query_weight=1.0, shared_random_queries=6, denoising_groups=1)
    queries, targets = StepQueries(*models, options, seed=3), targets_of(random_labels([2]))
    drawn, _ = queries.shared(targets, step=4)
    assert torch.equal(drawn[RANDOM_QUERIES].position, random_queries(models[1].detector, 6, 3, 4).position)
    noised = queries.noised([{"image_id": 8}], targets, step=4).queries[f"{NOISED}_1"]
    expected = noised_queries(targets, [8], len(models[0].class_names), options, seed=3, step=4).queries[f"{NOISED}_1"]
    assert torch.equal(noised.anchors, expected.anchors) and torch.equal(noised.content, expected.content)


def test_each_step_of_a_run_draws_its_own(tmp_path, monkeypatch):
    asked = []

    def shared(self, targets, step, draw=StepQueries.shared):
        asked.append(("shared", self.seed, step))
        return draw(self, targets, step)

    def noised(self, labels, targets, step, draw=StepQueries.noised):
        asked.append(("noised", self.seed, step))
        return draw(self, labels, targets, step)

    monkeypatch.setattr(step_queries.StepQueries, "shared", shared)
    monkeypatch.setattr(step_queries.StepQueries, "noised", noised)
    folder = make_shapes(tmp_path / "shapes", 4, 2, image_size=SIDE, progress=False)
    options = {"shared_query_weight": 1.0, "shared_random_queries": 3, "denoising_groups": 1, "seed": 5}
    shapes_trainer(folder, tmp_path / "run", per_device_train_batch_size=2, **options).train()
    assert asked == [(what, 5, step) for step in (0, 1) for what in ("shared", "noised")]
