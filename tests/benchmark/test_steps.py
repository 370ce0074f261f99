"""The steps that are timed do what they are said to do."""

from dataclasses import replace

import pytest
import torch

from d3etr_hf.training.trainer import DistillationTrainer
from scripts.benchmarking import steps
from scripts.benchmarking.sizes import SIZES, make_batch, make_detector, on_gpu, stock_labels, stock_twin

TINY = replace(SIZES["shapes"], batch=2, queries=5, layers=2, height=48, width=48)


def test_size_is_what_is_built():
    detector = make_detector(TINY.student, replace(TINY, classes=7), seed=0)
    assert detector.query_count == 5 and detector.decoder_depth == 2
    assert len(detector.class_names) == 7
    batch = make_batch(TINY)
    assert batch["pixel_values"].shape == (2, 3, 48, 48) and batch["targets"].shape == (2, 3, 5)
    assert [label["objects"] for label in batch["labels"]] == [TINY.objects] * 2
    for packed, label in zip(batch["targets"], stock_labels(batch), strict=True):
        assert packed[:, 0].tolist() == label["class_labels"].tolist() and torch.equal(packed[:, 1:], label["boxes"])
    assert batch["pixel_mask"][0].all() and not batch["pixel_mask"][1].all()
    assert on_gpu(SIZES["real"]).height == 800 and on_gpu(SIZES["shapes"]) == SIZES["shapes"]


def test_stock_twin_trains_what_the_student_trains_and_nothing_else_of_it():
    detector = make_detector(TINY.student, TINY, seed=0)
    twin = stock_twin(detector)
    assert twin.config.auxiliary_loss and not detector.config.auxiliary_loss
    own = dict(detector.named_parameters())
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, own[name]) and parameter.data_ptr() != own[name].data_ptr()
        assert parameter.requires_grad == own[name].requires_grad


@pytest.mark.parametrize("name", (*steps.STEPS, "step_custom_forms"))
def test_every_step_can_be_called_again_and_again(name):
    call = steps.make_steps(TINY, names=(name,))[name]
    call()
    call()


def test_two_groups_take_no_teacher_pass_and_no_maps(monkeypatch):
    """The floor must not hold what it is compared with."""
    seen = []
    original = DistillationTrainer._terms

    def spy(self, model, *args, **kwargs):
        options = self.args.distillation
        student, *terms = original(self, model, *args, **kwargs)
        maps = [group.self_attention for group in student.groups.values() if group.self_attention is not None]
        seen.append((options.distilled_groups, options.needs_teacher, list(student.groups), len(maps)))
        return student, *terms

    monkeypatch.setattr(DistillationTrainer, "_terms", spy)
    calls = steps.make_steps(TINY, names=("two groups", "step"))
    calls["two groups"]()
    calls["step"]()
    groups = ["own", "auxiliary"]
    assert seen == [((), False, groups, 0), (("own", "auxiliary"), True, groups, 2)]


def test_a_step_moves_the_student_and_not_the_teacher():
    trainer = steps.ready(steps.distillation_trainer(TINY))
    batch = trainer._prepare_inputs(make_batch(TINY))
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    teacher = [p.detach().clone() for p in trainer.teacher.detector.parameters()]
    steps.training_step(trainer, batch)
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) > len(after) / 2
    assert all(torch.equal(old, new) for old, new in zip(teacher, trainer.teacher.detector.parameters(), strict=True))


def test_parts_add_up_to_the_step():
    rows = steps.step_parts(TINY, rounds=2)
    assert len(rows) == 2
    for row in rows:
        parts = {name: seconds for name, seconds in row.items() if name != "step"}
        assert set(parts) == {
            "teacher", "attention with maps", "costs", "assignment", "matching, rest", "distillation losses",
            "detection losses", "backward", "optimizer", "rest",
        }  # fmt: skip
        assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(row["step"])
