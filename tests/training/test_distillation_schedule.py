"""When a training distils, against values by hand, a plain trainer and a trainer that always distils."""

from contextlib import nullcontext

import pytest
import torch

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.distillation_schedule import DistillationSchedule
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of
from tests.tiny import tiny_model

DISTILLED = ("self_attention", "cross_attention", "prediction")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (DistillationSchedule(), [1, 1, 1, 1, 1, 1, 1, 1]),
        (DistillationSchedule(distillation_interval=2), [1, 0, 1, 0, 1, 0, 1, 0]),
        (DistillationSchedule(distillation_interval=3), [1, 0, 0, 1, 0, 0, 1, 0]),
        (DistillationSchedule(distillation_end=0.5), [1, 1, 1, 1, 0, 0, 0, 0]),
        (DistillationSchedule(distillation_end=0.3), [1, 1, 1, 0, 0, 0, 0, 0]),
        (DistillationSchedule(distillation_decay=True), [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (DistillationSchedule(2, 0.5, True), [1, 0, 0.5, 0, 0, 0, 0, 0]),
    ],
)
def test_weights_by_hand(schedule, expected):
    assert [schedule.weight(step, 8) for step in range(8)] == pytest.approx(expected)
    assert schedule.weight(0, 0) == 1  # of a step that is tried out before the training is known


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, True),
        ({"fgd_weight": 1.0}, False),
        ({"clockdistill_memory_weight": 1.0}, False),
        ({"shared_query_weight": 1.0, "shared_object_queries": True}, False),
        ({"adaptive_matching": True}, False),
        ({"auxiliary_queries": "learned"}, False),
    ],
)
def test_a_schedule_is_of_whatever_a_teacher_or_a_further_group_brings(options, refused):
    schedule = DistillationSchedule(distillation_end=0.5)
    options = Distillation(**({"auxiliary_queries": "none", "adaptive_matching": False} | options))
    expected = pytest.raises(UnsupportedOptionError, match="nothing to plan") if refused else nullcontext()
    with expected:
        schedule.check(options)


def terms_at(trainer, step, steps=8):
    """Terms by name, and the loss, of one batch as the step would have them."""
    trainer.state.global_step, trainer.state.max_steps = step, steps
    batch = trainer._prepare_inputs(DetectionCollator()([trainer.train_dataset[index] for index in range(3)]))
    kept = []
    watch = trainer.guard.watch
    trainer.guard.watch = lambda terms: (
        kept.append({name: term.detach() for name, term in terms.items()}) or watch(terms)
    )
    loss = trainer.compute_loss(trainer.model.train(), batch)
    trainer.guard.watch = watch
    return kept[0], loss.detach()


def test_every_term_of_a_teacher_follows():
    """And no weight of anything else: those of the matching, and of ground truth."""
    weights = {name: 8.0 for name in Distillation().__dict__ if name.endswith("_weight")}
    now = DistillationSchedule(distillation_decay=True).at(Distillation(**weights), step=3, steps=4)
    kept = {"detection_weight", "distillation_class_weight", "distillation_l1_weight", "distillation_giou_weight"}
    kept |= {"one_to_many_weight", "logits_negative_weight"}
    assert {name: getattr(now, name) for name in weights} == {n: 8.0 if n in kept else 2.0 for n in weights}


def test_steps_without_distillation_are_plain_and_the_others_weigh_less(shapes, tmp_path):
    """The auxiliary group goes with the terms; a weight falls with each term in proportion."""
    options = {"distillation_interval": 2, "distillation_decay": True, "distillation_end": 0.5}
    planned = shapes_trainer(shapes, tmp_path, **options)
    always = shapes_trainer(shapes, tmp_path, student=tiny_model(seed=2))
    plain = shapes_trainer(shapes, tmp_path, student=tiny_model(seed=2), teacher=None)
    plain_terms, plain_loss = terms_at(plain, 0)
    full, _ = terms_at(always, 0)
    assert any(name.endswith(DISTILLED) for name in full) and any("auxiliary" in name for name in full)
    for step in (1, 3, 4, 6, 7):
        terms, loss = terms_at(planned, step)
        assert terms.keys() == plain_terms.keys() and torch.equal(loss, plain_loss)
    for step, weight in ((2, 0.5), (0, 1.0)):
        terms, _ = terms_at(planned, step)
        assert terms.keys() == full.keys()
        for name, value in full.items():
            expected = value * weight if name.endswith(DISTILLED) else value
            torch.testing.assert_close(terms[name], expected, rtol=1e-6, atol=1e-7)


def trained(shapes, output, resume=None, stop=None, **options):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "distillation_interval": 2} | options
    trainer = shapes_trainer(shapes, output, student=tiny_model(seed=2, dropout=0.1), **options)
    calls = []
    trainer.teacher.detector.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, calls


def test_the_teacher_is_asked_on_its_steps_alone_and_a_run_goes_on_exactly(shapes, tmp_path):
    options = {"distillation_decay": True, "distillation_end": 0.75}
    whole, calls = trained(shapes, tmp_path, **options)
    assert calls == [0, 2, 4]
    logs = {entry["step"]: entry for entry in whole.state.log_history if "loss" in entry}
    assert [step for step, entry in logs.items() if "loss/student/prediction" in entry] == [1, 3, 5]
    for place in ("3", "4"):
        resumed, more = trained(shapes, tmp_path, resume=str(tmp_path / f"checkpoint-{place}"), **options)
        assert more == [4] and torch.equal(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_interval": 0}, "distillation_interval=0: must be 1 or more"),
        ({"distillation_end": 0.0}, "distillation_end=0.0: must be a share"),
        ({"distillation_end": 1.5}, "distillation_end=1.5: must be a share"),
        ({"distillation_interval": 2, "detection_weight": 0.0}, "distillation_interval=2, .*detection_weight is 0"),
        ({"distillation_decay": True, "teacher": None}, "distillation_decay=True: nothing is distilled"),
    ],
)
def test_a_schedule_of_nothing_is_refused(shapes, tmp_path, options, message):
    with pytest.raises(UnsupportedOptionError, match=message):
        shapes_trainer(shapes, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distillation_interval": 2, "logging_steps": 2}, {2: True, 4: True, 6: True, 8: True}),
        ({"distillation_interval": 3, "logging_steps": 2, "logging_first_step": True}, {1: 1, 2: 0, 4: 1, 6: 0, 8: 1}),
    ],
)
def test_gradient_norms_are_of_a_step_that_distils(shapes, tmp_path, options, expected):
    """Steps 0, 2, ..., or 0, 3 and 6, do: the norms are those of one such step alone, as if each step were logged."""
    whole, _ = trained(shapes, tmp_path / "each", log_gradient_norms=True, **(options | {"logging_steps": 1}))
    trainer, _ = trained(shapes, tmp_path / "some", log_gradient_norms=True, **options)
    each, some = ({log["step"]: log for log in t.state.log_history if "loss" in log} for t in (whole, trainer))
    assert {step: "gradient_norm/student/self_attention" in log for step, log in some.items()} == expected
    interval, every = options["distillation_interval"], options["logging_steps"]
    for step, log in some.items():
        told = range(step - every if step > 1 else 0, step)
        of = max((s for s in told if s % interval == 0 and not (s == 0 < step - 1 and 1 in some)), default=step - 1)
        norms = {name: value for name, value in log.items() if name.startswith("gradient_norm/")}
        assert norms == {name: pytest.approx(each[of + 1][name], rel=1e-5) for name in norms} and norms
