"""The moving average against a loop from its formula; what is evaluated, saved and resumed."""

import math

import pytest
import torch
from torch import nn

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CheckpointError
from d3etr_hf.models.loading import load_detector
from d3etr_hf.training.checkpoints import seal
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.weight_average import TRAINED_WEIGHTS, WeightAverage
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of

DECAY, WARMUP = 0.9, 3


def expected_average(weights: list[torch.Tensor]) -> torch.Tensor:
    """The first weights, then step by step."""
    average = weights[0].double()
    for steps, value in enumerate(weights[1:], start=1):
        kept = DECAY * (1 - math.exp(-steps / WARMUP))
        average = kept * average + (1 - kept) * value.double()
    return average


def test_average_equals_a_loop():
    """Running statistics among it; what is set aside and what is frozen is left out."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.BatchNorm2d(2), "aside": nn.Linear(3, 2)})
    model["linear"].bias.requires_grad_(False)
    weight, mean = model["linear"].weight, model["norm"].running_mean
    keeper = WeightAverage(model, DECAY, WARMUP, "aside")
    before = weight.detach().clone()
    with keeper.in_place():
        assert torch.equal(weight, before)  # no step yet
    seen = []
    for _ in range(6):
        with torch.no_grad():
            weight.normal_()
            mean.normal_()
        seen.append((weight.detach().clone(), mean.clone()))
        keeper.on_optimizer_step(None, None, None)
    with pytest.raises(RuntimeError, match="within"), keeper.in_place():
        for tensor, values in zip((weight, mean), zip(*seen, strict=True), strict=True):
            torch.testing.assert_close(tensor.double(), expected_average(values), atol=1e-6, rtol=0)
        raise RuntimeError("within")
    assert torch.equal(weight, seen[-1][0]) and torch.equal(mean, seen[-1][1])
    assert not {"aside.weight", "linear.bias"} & keeper.values.keys()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, 8, 3, image_size=SIDE, progress=False)
    return folder


def run(shapes, output, steps: int, checkpoint=None):
    trainer = shapes_trainer(
        shapes,
        output,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        ema_decay=DECAY,
        ema_warmup_steps=WARMUP,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    trainer.args.max_steps = steps
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_the_average_is_evaluated_and_saved_and_survives_a_stop(shapes, tmp_path):
    trainer = run(shapes, tmp_path / "whole", 4)
    trained, average = weights_of(trainer.model), dict(trainer.weight_average.values)
    name = "bbox_predictor.layers.0.weight"
    assert (average[name] - trainer.model.get_parameter(name)).abs().max() > 1e-4
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, _: seen.append(module.get_parameter(name).detach().clone()))
    trainer.evaluate()
    assert torch.equal(seen[0], average[name]) and torch.equal(weights_of(trainer.model), trained)
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-4"):
        saved = load_detector(str(folder))
        assert all(torch.equal(value, average[key]) for key, value in saved.named_parameters() if key in average)
        assert name in average
    again = run(shapes, tmp_path / "whole", 4, str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(weights_of(again.model), trained, atol=1e-5, rtol=1e-5)
    for key, value in again.weight_average.values.items():
        torch.testing.assert_close(value, average[key], atol=1e-5, rtol=1e-5)


def test_averaged_checkpoints_go_on_as_they_began(shapes, tmp_path):
    """Without what trained, or without an average to keep, a run would go on from other weights."""
    trainer = run(shapes, tmp_path, 4)
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer.weight_average = None
    with pytest.raises(ValueError, match="ema_decay as its run did"):
        trainer._load_from_checkpoint(checkpoint)
    (tmp_path / "checkpoint-4" / TRAINED_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"its {TRAINED_WEIGHTS} is missing"):
        run(shapes, tmp_path, 4, str(tmp_path / "checkpoint-4"))
    seal(tmp_path / "checkpoint-4")  # as if it had never been there
    with pytest.raises(ValueError, match=f"{TRAINED_WEIGHTS} is not in it"):
        run(shapes, tmp_path, 4, str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("options", [{"ema_decay": 1.0}, {"ema_decay": 0.0}, {"ema_warmup_steps": -1}])
def test_values_out_of_range_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
