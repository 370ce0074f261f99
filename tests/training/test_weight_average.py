"""The moving average against a loop from its formula; what is evaluated, saved and resumed."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.loading import load_detector
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.weight_average import WeightAverage
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
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    keeper = WeightAverage(model, DECAY, WARMUP)
    before = model.weight.detach().clone()
    with keeper.in_place():
        assert torch.equal(model.weight, before)  # no step yet
    seen = []
    for _ in range(6):
        with torch.no_grad():
            model.weight.normal_()
        seen.append(model.weight.detach().clone())
        keeper.on_optimizer_step(None, None, None)
    with keeper.in_place():
        torch.testing.assert_close(model.weight.double(), expected_average(seen), atol=1e-6, rtol=0)
    assert torch.equal(model.weight, seen[-1])


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
    trained = weights_of(trainer.model)
    average = torch.cat([p.detach().flatten() for p in trainer.weight_average.average.module.parameters()])
    assert (average - trained).abs().max() > 1e-4
    checkpoint = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    name = "bbox_predictor.layers.0.weight"
    assert torch.equal(checkpoint[name], trainer.model.get_parameter(name))  # goes on from what trains
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, _: seen.append(weights_of(module)))
    trainer.evaluate()
    torch.testing.assert_close(seen[0], average[: len(seen[0])] if len(average) != len(seen[0]) else average)
    assert torch.equal(weights_of(trainer.model), trained)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_detector(str(tmp_path / "saved"))
    own = dict(trainer.weight_average.average.module.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in saved.named_parameters())
    again = run(shapes, tmp_path / "whole", 4, str(tmp_path / "whole" / "checkpoint-2"))
    resumed = torch.cat([p.detach().flatten() for p in again.weight_average.average.module.parameters()])
    torch.testing.assert_close(resumed, average, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"ema_decay": 1.0}, {"ema_decay": 0.0}, {"ema_warmup_steps": -1}])
def test_values_out_of_range_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
