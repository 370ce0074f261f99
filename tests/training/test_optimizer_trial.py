"""The optimizer's share of a probe: of optimizers that cannot be copied, want to be told, fail, or do not fit."""

import re

import pytest
import torch
from transformers import TrainerCallback

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import BatchSizeError
from d3etr_hf.training.optimizer_trial import try_optimizer
from d3etr_hf.training.step_probe import StepProbe
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 4, 2, image_size=SIDE, progress=False)


class Particular(torch.optim.AdamW):
    """Has settings outside its groups, as those of bitsandbytes, and wants `train()`, as schedule-free ones."""

    def __init__(self, params, lr, *, bits):
        super().__init__(params, lr, amsgrad=bits == 64)
        self.bits, self.training = bits, False

    def train(self):
        self.training = True

    def step(self, closure=None):
        if not self.training or self.bits not in (32, 64):
            raise RuntimeError("Optimizer was not in train mode when step is called")
        return super().step(closure)


class TooLarge(torch.optim.SGD):
    """Keeps more than there is."""

    def step(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Looks(TrainerCallback):
    """Tries the optimizer when a training begins, and ends the training after its first step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        before = weights_of(self.trainer.model)
        self.trial = try_optimizer(self.trainer)
        assert torch.equal(weights_of(self.trainer.model), before)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def numbers_in(states) -> list[int]:
    """How many each tensor holds, of the states of all parameters."""
    return sorted(value.numel() for state in states for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_twin_keeps_as_much_as_the_optimizer_after_its_first_step(shapes, tmp_path, bits):
    trainer = shapes_trainer(shapes, tmp_path, teacher=None)
    trainer.optimizer_cls_and_kwargs = Particular, {"lr": 1e-3, "bits": bits}
    looks = Looks(trainer)
    trainer.add_callback(looks)
    trainer.train()
    real = trainer.optimizer.optimizer
    assert type(real) is Particular and looks.trial.failure is None and looks.trial.seconds > 0
    assert numbers_in(looks.trial.kept) == numbers_in(real.state.values()) != []


def test_an_optimizer_that_was_given_and_cannot_be_copied_is_left_out(shapes, tmp_path, capsys):
    """Only its maker knows how it was built."""
    trainer = shapes_trainer(shapes, tmp_path, teacher=None, max_steps=60)
    trainer.optimizer = Particular(trainer.model.parameters(), 1e-3, bits=32)
    looks = Looks(trainer)
    trainer.add_callback(looks)
    trainer.add_callback(StepProbe(trainer))
    trainer.train()
    assert trainer.state.global_step == 1 and looks.trial.seconds == 0 and looks.trial.kept == []
    (line,) = re.findall(".*optimizer.*", capsys.readouterr().out)
    assert line.startswith("these figures are without the optimizer's share") and "AttributeError" in line


def test_an_optimizer_that_was_given_and_can_be_copied_counts(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path, teacher=None)
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), 1e-3)
    looks = Looks(trainer)
    trainer.add_callback(looks)
    trainer.train()
    assert numbers_in(looks.trial.kept) == numbers_in(trainer.optimizer.optimizer.state.values()) != []


@pytest.mark.parametrize("finding", [True, False])
def test_an_optimizer_that_does_not_fit_is_refused(shapes, tmp_path, finding):
    """No smaller batch would help."""
    trainer = shapes_trainer(shapes, tmp_path, teacher=None, max_steps=60, auto_find_batch_size=finding)
    trainer.optimizer_cls_and_kwargs = TooLarge, {"lr": 1e-3}
    trainer.add_callback(StepProbe(trainer))
    with pytest.raises(BatchSizeError, match=r"TooLarge: .* GiB of memory.*; .*optim.*probe=False") as refused:
        trainer.train()
    assert "\n" not in str(refused.value)
