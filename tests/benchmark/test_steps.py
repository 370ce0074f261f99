"""The steps that are timed do what they are said to do."""

from dataclasses import replace

import pytest
import torch

from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from scripts.benchmarking import steps
from scripts.benchmarking.sizes import SIZES, make_batch, make_detector, on_gpu, stock_twin

TINY = replace(SIZES["shapes"], batch=2, queries=5, layers=2, height=48, width=48)


def test_size_is_what_is_built():
    detector = make_detector(TINY.student, replace(TINY, classes=7), seed=0)
    assert detector.config.num_queries == 5 and detector.config.decoder_layers == 2
    assert detector.config.num_labels == 7
    batch = make_batch(TINY)
    assert batch["pixel_values"].shape == (2, 3, 48, 48) and len(batch["labels"]) == 2
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


@pytest.mark.parametrize("name", steps.STEPS)
def test_every_step_can_be_called_again_and_again(name):
    call = steps.make_steps(TINY, names=(name,))[name]
    call()
    call()


def test_two_groups_take_no_teacher_pass_and_no_maps(monkeypatch):
    """The floor must not hold what it is compared with."""
    seen = []
    original = D3etrTrainer.compute_loss

    def spy(self, model, *args, **kwargs):
        seen.append((self.args.distilled_groups(), self.args.reads_teacher_outputs, len(model.extra_query_groups)))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(D3etrTrainer, "compute_loss", spy)
    calls = steps.make_steps(TINY, names=("two groups", "step"))
    calls["two groups"]()
    calls["step"]()
    assert seen == [((), False, 1), (("student", "auxiliary"), True, 1)]


def test_a_step_moves_the_student_and_not_the_teacher():
    trainer = steps.ready(steps.distillation_trainer(TINY))
    batch = trainer._prepare_inputs(make_batch(TINY))
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    teacher = [p.detach().clone() for p in trainer.teacher.parameters()]
    steps.training_step(trainer, batch)
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) > len(after) / 2
    assert all(torch.equal(old, new) for old, new in zip(teacher, trainer.teacher.parameters(), strict=True))


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
