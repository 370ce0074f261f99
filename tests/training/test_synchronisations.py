"""How often a training step waits for the device: counted without one (tests/synchronisations.py)."""

from functools import partial

import pytest
import torch

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.matching import solver
from d3etr_hf.models.loading import FAMILIES
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.synchronisations import counted_copies_to_device, counted_synchronisations
from tests.tiny import tiny_model
from tests.toy_detector import toy_model

# the teacher's assignment of ground truth, all other assignments together, the look at the loss after the backward
# pass; a step that logs reads its means as well
MOST_IN_A_STEP = 3
# what the step's sums are divided by; both kinds of solutions, together
MOST_COPIES_IN_A_STEP = 3
# a stock model's own waits: places of denoising queries that are positive; of RT-DETR's heirs a check of shapes in
# every decoder layer of student and teacher
STOCK_WAITS = {"rt_detr": 1, "d_fine": 7, "deimv2": 7, "rt_detr_v2": 7}
# and its copies, of student and teacher: the shapes of its levels
STOCK_COPIES = {"deformable_detr": 2}
MODELS = {family: partial(tiny_model, model_type=family) for family in FAMILIES} | {"toy detector": toy_model}


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
        trainer._get_grad_norm(trainer.model_wrapped, trainer._clip_grad_norm(trainer.model_wrapped))
        trainer.optimizer.step()

    return step


@pytest.fixture(params=MODELS)
def step_and_trainer(request, shapes, tmp_path):
    """A step that is not the first one: that draws and allocates."""
    model = MODELS[request.param]
    trainer = shapes_trainer(shapes, tmp_path, student=model(2), teacher=model(1))
    step = training_step(trainer)
    step()
    return step, trainer


def test_a_step_waits_three_times(step_and_trainer):
    step, trainer = step_and_trainer
    with counted_synchronisations([(solver, "on_host")]) as counts:
        step()
    assert counts["on_host"] == 2
    most = MOST_IN_A_STEP + STOCK_WAITS.get(trainer.model.config.model_type, 0)
    assert sum(counts.values()) <= most, counts
    with counted_synchronisations([(solver, "on_host")]) as counts:
        trainer._term_log.read()
    assert dict(counts) == {"tolist": 1}


def test_a_step_copies_little_to_the_device(step_and_trainer):
    step, trainer = step_and_trainer
    most = MOST_COPIES_IN_A_STEP + STOCK_COPIES.get(trainer.model.config.model_type, 0)
    with counted_copies_to_device([(solver, "on_device")]) as counts:
        step()
    assert counts["on_device"] == 2
    # some stock models hand the shapes of their memory over, the student's and the teacher's
    assert counts.pop("as_tensor", 0) <= 2
    assert sum(counts.values()) <= most, counts


def test_the_counters_see_what_they_count():
    """Else the tests above could not fail."""
    values, device = torch.arange(3.0), torch.device("cpu")
    with counted_synchronisations([]) as counts:
        values.sum().item()
        if values.any():
            values.tolist()
        values[values > 1].cpu()
        values.to("cpu")
        values.to(torch.device("cpu"), torch.float64)
        values.to(device=torch.device("cpu"))
        values.to(device)  # nothing can tell where this goes elsewhere
        values.to(torch.float64)
    assert counts == {"aten::_local_scalar_dense": 2, "tolist": 1, "aten::index": 1, "cpu": 1, "to cpu": 3}
    with counted_copies_to_device([]) as copies:
        torch.tensor([1.0], device=device)
        torch.as_tensor([1.0], device=device)
        values.new_tensor([1.0])
        torch.tensor([1.0])
        torch.zeros(3, device=device)
    assert copies == {"tensor": 1, "as_tensor": 1, "new_tensor": 1}
