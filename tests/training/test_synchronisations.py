"""How often a training step waits for the device: counted without one (tests/synchronisations.py)."""

import pytest

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.matching import solver
from d3etr_hf.models.loading import FAMILIES
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.synchronisations import counted_synchronisations
from tests.tiny import tiny_model

# the teacher's assignment of ground truth, all other assignments together, the look at the loss after the backward
# pass; a step that logs reads its means as well
MOST_IN_A_STEP = 3


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 2, image_size=SIDE, progress=False)


def training_step(trainer):
    """One training step as Trainer's loop takes it, ready to be called."""
    batch = DetectionCollator()([trainer.train_dataset[index] for index in range(4)])
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step():
        counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
        trainer.training_step(trainer.model_wrapped, batch, counts)
        trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()

    return step


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_three_times(shapes, tmp_path, family):
    trainer = shapes_trainer(shapes, tmp_path, student=tiny_model(2, family), teacher=tiny_model(1, family))
    step = training_step(trainer)
    step()  # the first one draws and allocates
    with counted_synchronisations([(solver, "on_host")]) as counts:
        step()
    assert counts["on_host"] == 2
    assert sum(counts.values()) <= MOST_IN_A_STEP, counts
    with counted_synchronisations([(solver, "on_host")]) as counts:
        trainer._term_log.read()
    assert dict(counts) == {"tolist": 1}


def test_the_counter_sees_what_waits():
    """Else the test above could not fail."""
    import torch

    values = torch.arange(3.0)
    with counted_synchronisations([]) as counts:
        values.sum().item()
        if values.any():
            values.tolist()
        values[values > 1].cpu()
        values.to("cpu")
    assert counts == {"aten::_local_scalar_dense": 2, "tolist": 1, "aten::index": 1, "cpu": 1, "to cpu": 1}
