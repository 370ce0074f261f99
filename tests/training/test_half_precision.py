"""float16 and bfloat16: what leaves autocast, and steps that the gradient scaler passes over."""

from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import NonFiniteLossError
from d3etr_hf.training import half_precision
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 16, 4, image_size=SIDE, progress=False)


class Overflow(TrainerCallback):
    """Makes a forward pass overflow in the steps that are named, and mends the weight after each."""

    def __init__(self, steps, name="class_labels_classifier"):
        self.steps, self.name, self.kept = steps, name, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            weight = model.get_submodule(self.name).weight
            self.kept = weight.detach().clone()
            with torch.no_grad():
                weight.fill_(float("inf"))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.kept is not None:
            with torch.no_grad():
                model.get_submodule(self.name).weight.copy_(self.kept)
            self.kept = None


class UnscaleGradients(TrainerCallback):
    """Accelerate unscales gradients under `native_amp`, which would also put the model in autocast if set before."""

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def on_train_begin(self, args, state, control, **kwargs):
        self.accelerator.native_amp = True


@pytest.fixture
def with_scaler(monkeypatch):
    """Makes a trainer step as under float16 on a GPU: through a gradient scaler, which a CPU has too."""

    def changed(trainer):
        monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", property(lambda self: "fp16"))
        trainer.accelerator.autocast = nullcontext  # float16 itself a CPU hardly knows
        trainer.add_callback(UnscaleGradients(trainer.accelerator))
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer.objective.tolerant = True
        return trainer

    return changed


def test_a_step_that_overflows_is_skipped_and_counted(shapes, tmp_path, with_scaler):
    trainer = with_scaler(
        shapes_trainer(shapes, tmp_path, max_steps=3, callbacks=[Overflow({1})], logging_steps=3, max_grad_norm=0.1)
    )
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = weights_of(model).clone()

    trainer.add_callback(Keep())
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["skipped_steps"] == 1
    assert torch.equal(seen[1], seen[2])  # the second step left every weight as it was
    assert not torch.equal(seen[2], seen[3]) and seen[3].isfinite().all()
    assert trainer.accelerator.scaler.get_scale() == 2.0**9


def test_batch_norm_keeps_nothing_of_a_step_that_was_skipped(shapes, tmp_path, with_scaler):
    """And nothing else is kept of any step: the guard would hold every batch of a training."""
    student, seen = tiny_model(seed=2, model_type="rt_detr"), []
    overflow = Overflow({1}, next(name for name, _ in student.named_modules() if name.endswith("fc1")))
    trainer = with_scaler(shapes_trainer(shapes, tmp_path, student, teacher=None, max_steps=3, callbacks=[overflow]))

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            buffers = {n: b.clone() for n, b in student.named_buffers() if n.endswith(("running_mean", "running_var"))}
            seen.append((buffers, len(trainer.guard._watched)))

    trainer.add_callback(Keep())
    trainer.train()
    (first, _), (second, _), (third, _) = seen
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)
    assert [watched for _, watched in seen] == [0, 0, 0]


def test_a_run_that_skips_without_end_stops_with_the_reason(shapes, tmp_path, monkeypatch, with_scaler):
    monkeypatch.setattr(half_precision, "MOST_SKIPPED_IN_A_ROW", 3)
    trainer = with_scaler(shapes_trainer(shapes, tmp_path, max_steps=9, callbacks=[Overflow(set(range(9)))]))
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row were skipped.*float16.*bf16"):
        trainer.train()


def test_steps_that_were_skipped_between_others_stop_nothing(shapes, tmp_path, monkeypatch, with_scaler):
    """A scaler probes its scale now and then: only steps in a row say that a run has diverged."""
    monkeypatch.setattr(half_precision, "MOST_SKIPPED_IN_A_ROW", 3)
    overflow = Overflow({0, 1, 3, 4})
    trainer = with_scaler(shapes_trainer(shapes, tmp_path, max_steps=6, callbacks=[overflow], logging_steps=6))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["skipped_steps"] == 4


def test_gradient_norms_are_of_the_scaled_loss(shapes, tmp_path, with_scaler):
    """They are those of float32, whatever the scale."""
    entries = []
    for scaled in (False, True):
        trainer = shapes_trainer(shapes, tmp_path / str(scaled), max_steps=1, log_gradient_norms=True)
        trainer = with_scaler(trainer) if scaled else trainer
        trainer.train()
        entries.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    names = [name for name in entries[0] if name.startswith("gradient_norm/")]
    assert len(names) == 12
    for name in names:
        assert entries[1][name] == pytest.approx(entries[0][name], rel=1e-4), name
