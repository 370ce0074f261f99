"""A run that goes on after an interruption is the run that nothing stopped, bit by bit."""

import pytest
import torch
from transformers import TrainerCallback

from d3etr_hf.data import Augmentation, CropSizes
from d3etr_hf.data.shapes import make_shapes
from tests.shapes_fixture import SIDE, load_shapes, shapes_trainer, weights_of
from tests.tiny import tiny_model

# 5 batches an epoch: step 3 is within the first, step 8 within the second
OPTIONS = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 100}


class StopAt(TrainerCallback):
    """Stops after a step, as a kill would: nothing is saved beyond what the run saves anyway."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step or control.should_training_stop


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 10, 3, image_size=SIDE, progress=False)


def train(shapes, output, steps, stop=1000, resume=None, family="conditional_detr", unlabeled_ratio=None, **options):
    """A run with dropout and augmentation; for squares the size is drawn for whole batches.

    With a ratio all but the first three images are without labels.
    """
    data = load_shapes(shapes, "train", family=family)
    transform = data.transform
    if family == "conditional_detr":
        transform.augmentation = Augmentation([48, 56, SIDE], SIDE, CropSizes((40, 50, 60), 38, 60))
    else:
        transform.augmentation = Augmentation(crop=CropSizes(), batch_sizes=[(32, 32), (SIDE, SIDE)])
    if unlabeled_ratio is not None:
        data = data.select(range(3)).with_unlabeled(data.select(range(3, 10)), unlabeled_ratio)
    trainer = shapes_trainer(
        shapes,
        output,
        student=tiny_model(seed=2, model_type=family, dropout=0.1),
        teacher=tiny_model(seed=1, model_type=family),
        train=data,
        callbacks=[StopAt(stop)],
        max_steps=steps,
        **(OPTIONS | options),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("workers", "family", "stop", "ratio"),
    [(0, "rt_detr", 3, None), (2, "conditional_detr", 8, None), (0, "rt_detr", 6, 1.67)],
)
def test_a_run_killed_within_an_epoch_goes_on_as_if_nothing_had_been(shapes, tmp_path, workers, family, stop, ratio):
    """Augmentation, dropout and denoising queries; a data loader has fetched ahead when the run is stopped."""
    options = {"family": family, "dataloader_num_workers": workers, "unlabeled_ratio": ratio}
    whole = train(shapes, tmp_path / "whole", stop + 3, **options)
    train(shapes, tmp_path / "killed", stop + 3, stop=stop, **options)
    resume = str(tmp_path / "killed" / f"checkpoint-{stop}")
    resumed = train(shapes, tmp_path / "killed", stop + 3, resume=resume, **options)
    assert resumed.state.global_step == stop + 3
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))


def test_augmentation_does_not_depend_on_workers(shapes, tmp_path):
    """They keep a copy of the data set for all epochs, and share out the images among themselves."""
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    alone, shared = train(shapes, tmp_path / "0", 7), train(shapes, tmp_path / "2", 7, **options)
    assert torch.equal(weights_of(shared.model), weights_of(alone.model))
