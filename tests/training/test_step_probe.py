"""The probe before the first step: it changes nothing, says what comes, and refuses what does not fit."""

import re
import time
from datetime import datetime

import pytest
import torch
from transformers import TrainerCallback

from d3etr_hf.data import Augmentation, CropSizes
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import BatchSizeError
from d3etr_hf.training import memory_growth, step_probe
from d3etr_hf.training.step_probe import GIB, Forecast, StepProbe, forecast
from tests.shapes_fixture import SIDE, load_shapes, shapes_trainer, weights_of
from tests.tiny import tiny_model


class StopAt(TrainerCallback):
    """Ends a training after a step, and keeps the random state there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            self.random_state = torch.get_rng_state()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 10, 3, image_size=SIDE, progress=False)


def make_trainer(shapes, output, family="conditional_detr", stop=3, probe=True, **options):
    """A trainer that stops early in a training of 60 steps, with dropout, augmentation, and a probe."""
    data = load_shapes(shapes, "train", family=family)
    if family == "conditional_detr":
        data.transform.augmentation = Augmentation([48, 56, SIDE], SIDE, CropSizes((40, 50, 60), 38, 60))
    else:
        data.transform.augmentation = Augmentation(crop=CropSizes(), batch_sizes=[(32, 32), (SIDE, SIDE)])
    trainer = shapes_trainer(
        shapes,
        output,
        student=tiny_model(seed=2, model_type=family, dropout=0.1),
        teacher=tiny_model(seed=1, model_type=family),
        train=data,
        callbacks=[StopAt(stop)],
        **{"max_steps": 60, "per_device_train_batch_size": 2, "probe": probe, **options},
    )
    trainer.add_callback(StepProbe(trainer))
    return trainer


class GuardsNothing(TrainerCallback):
    """Sees that no batch is watched when a step begins: a NaN in the step would be told of that."""

    def __init__(self, trainer):
        self.guard = trainer.guard

    def on_step_begin(self, args, state, control, **kwargs):
        assert not self.guard._watched


def what_came(trainer) -> dict:
    """All that a training leaves, to the last bit; without what was measured."""
    trainer.add_callback(GuardsNothing(trainer))
    trainer.train()
    logs = [{n: v for n, v in log.items() if "loss" in n or "norm" in n} for log in trainer.state.log_history]
    (stopped,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, StopAt))
    return {
        "weights": weights_of(trainer.model),
        "buffers": torch.cat([torch.zeros(1), *(buffer.flatten().double() for buffer in trainer.model.buffers())]),
        "logs": logs[:-1],  # the last one is the sum of the others, by seconds
        "random": stopped.random_state,
    }


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("rt_detr", {"dataloader_num_workers": 2}),  # batch norm, denoising queries, sizes drawn for whole batches
        ("conditional_detr", {"gradient_accumulation_steps": 2, "log_gradient_norms": True}),
    ],
)
def test_a_training_is_the_same_with_and_without(shapes, tmp_path, capsys, family, options):
    probed = what_came(make_trainer(shapes, tmp_path / "with", family, **options))
    lines = capsys.readouterr().out.splitlines()
    without = what_came(make_trainer(shapes, tmp_path / "without", family, probe=False, **options))
    said = "a step takes about", "peak memory about", "largest per_device_train_batch_size that fits in"
    assert all(line.startswith(begin) for line, begin in zip(lines, said, strict=False)) and len(lines) > 3
    assert not any(begin in capsys.readouterr().out for begin in said)
    assert probed["logs"] == without["logs"] and len(probed["logs"]) == 3
    for name in ("weights", "buffers", "random"):
        assert torch.equal(probed[name], without[name]), name


@pytest.mark.parametrize("options", [{"probe": False}, {"max_steps": 49}, {"torch_compile": True}, {"split": True}])
def test_a_training_that_is_short_compiled_or_told_so_has_no_probe(shapes, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(step_probe, "forecast", lambda trainer: pytest.fail("a probe"))
    trainer = make_trainer(shapes, tmp_path)
    trainer.state.max_steps = options.get("max_steps", 60)
    trainer.accelerator.dataloader_config.split_batches = "split" in options
    for name, value in options.items():
        setattr(trainer.args, name, value)
    StepProbe(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)


def test_other_data_has_no_probe(shapes, tmp_path, monkeypatch):
    """Nobody knows how large it gets."""
    monkeypatch.setattr(step_probe, "forecast", lambda trainer: pytest.fail("a probe"))
    trainer = make_trainer(shapes, tmp_path)
    trainer.state.max_steps, trainer.train_dataset = 60, [*range(10)]
    StepProbe(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_training_that_goes_on_has_no_probe(shapes, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(shapes, tmp_path, stop=1, probe=False, **options).train()
    monkeypatch.setattr(step_probe, "forecast", lambda trainer: pytest.fail("a probe"))
    make_trainer(shapes, tmp_path, stop=2, **options).train(resume_from_checkpoint=True)


# what it says


class Looks(TrainerCallback):
    """Takes a forecast when a training begins."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.forecast = forecast(self.trainer)


def forecast_of(trainer) -> Forecast:
    looks = Looks(trainer)
    trainer.add_callback(looks)
    trainer.train()
    return looks.forecast


MEBIBYTE = 2**20


def take(monkeypatch, trainer, bytes_of_an_image, seconds=0.03, most=1000, error="CUDA out of memory. Tried"):
    """Instead of trial steps such that hold so much memory for so long, and fail beyond so many images."""
    seen = []

    def trial_step(batch):
        pixels = batch["pixel_values"]
        seen.append((*pixels.shape, [label["objects"] for label in batch["labels"]]))
        if len(pixels) > most:
            raise torch.OutOfMemoryError(error)
        held = torch.ones(len(pixels) * bytes_of_an_image // 4)
        time.sleep(seconds)
        del held

    monkeypatch.setattr(trainer, "trial_step", trial_step)
    return seen


def test_memory_grows_with_the_batch_as_it_was_seen_to(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path, probe=False, stop=1, per_device_train_batch_size=4)
    trainer.train_dataset.transform.augmentation = None  # images of one size, of which the heap does not scatter
    trainer.train_dataset = trainer.train_dataset.select([*range(10)] * 5)
    an_image, room = 160 * MEBIBYTE, 2000 * MEBIBYTE  # far above what else a process of many tests takes meanwhile
    seen = take(monkeypatch, trainer, an_image)
    held: list[int] = []

    def to_be_had(device, processes):
        held.append(memory_growth.held_memory(device))
        return held[0] + room

    monkeypatch.setattr(memory_growth, "memory_to_be_had", to_be_had)
    found = forecast_of(trainer)
    assert found.peak - held[0] == pytest.approx(4 * an_image, rel=0.1)
    assert abs(found.largest_batch - (0.95 * (held[0] + room) - held[0]) / an_image) <= 1
    # memory: the largest images with the most objects; time: images as they come
    most = max(len(row["class_labels"]) for row in trainer.train_dataset.rows)
    assert [size[0] for size in seen] == [1, 2, 4, 4, 4]
    assert all(size[2:] == (SIDE, SIDE, [most] * size[0]) for size in seen[:3])
    assert (found.height, found.width, found.objects) == (SIDE, SIDE, most)


def test_the_peak_is_of_the_trainings_own_batch(shapes, tmp_path, monkeypatch):
    """Of one image two are tried, to know how memory grows."""
    trainer = make_trainer(shapes, tmp_path, probe=False, stop=1, per_device_train_batch_size=1)
    trainer.train_dataset.transform.augmentation = None
    seen = take(monkeypatch, trainer, 60 * MEBIBYTE)
    before = memory_growth.held_memory(trainer.args.device)
    found = forecast_of(trainer)
    assert [size[0] for size in seen] == [1, 2, 1, 1]
    assert found.peak - before < 100 * MEBIBYTE


@pytest.mark.parametrize(("workers", "expected"), [(0, 2 * (0.2 + 0.08)), (1, 2 * 0.2), (2, 2 * 0.2)])
def test_seconds_are_of_whole_steps(shapes, tmp_path, monkeypatch, workers, expected):
    """Of two batches, and what loading them takes where nobody does it meanwhile: 40 ms an image."""
    options = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    trainer = make_trainer(shapes, tmp_path, probe=False, stop=1, **options)
    take(monkeypatch, trainer, 4, seconds=0.2)
    read = type(trainer.train_dataset)._read_image

    def slow(self, row):
        time.sleep(0.04)
        return read(self, row)

    monkeypatch.setattr(type(trainer.train_dataset), "_read_image", slow)
    found = forecast_of(trainer)
    assert found.step_seconds == pytest.approx(expected, rel=0.25) and found.steps == 60


def test_images_that_differ_in_size_scatter_the_heap_of_a_cpu(shapes, tmp_path, monkeypatch):
    """More is foretold than the first steps take."""
    found = []
    for augmentation in (None, Augmentation([32, 48, SIDE], SIDE)):
        trainer = make_trainer(shapes, tmp_path, probe=False, stop=1)
        trainer.train_dataset.transform.augmentation = augmentation
        take(monkeypatch, trainer, 100 * MEBIBYTE)
        before = memory_growth.held_memory(trainer.args.device)
        found.append(forecast_of(trainer).peak - before)
    assert found[0] == pytest.approx(200 * MEBIBYTE, rel=0.1) and found[1] == pytest.approx(300 * MEBIBYTE, rel=0.1)


def test_the_lines():
    lines = Forecast(3 * GIB, 16 * GIB, 12, 800, 1333, 62, 1.25, 0.25, 1000).lines(datetime(2026, 3, 1, 23, 50))
    assert lines == [
        "a step takes about 1.25 s (0.25 s of them for loading images); 1000 steps end about 2026-03-02 00:10, after "
        "0:20:50, without evaluation",
        "peak memory about 3.00 GiB, with images of 1333×800 pixels and 62 objects each",
        "largest per_device_train_batch_size that fits in 16.0 GiB: about 12",
    ]


def test_a_step_is_timed_as_the_schedule_mixes_them(shapes, tmp_path, monkeypatch):
    """Every third distils, in the first half of 60 steps: 10 of 60, which take 0.6 s here, and the others 0.06 s."""
    options = {"distillation_interval": 3, "distillation_end": 0.5, "teacher_cache": str(tmp_path / "cache")}
    trainer = shapes_trainer(shapes, tmp_path, max_steps=60, callbacks=[StopAt(1)], **options)
    asked, batch = [], trainer.data_collator([trainer.train_dataset[0]])
    trainer.teacher.detector.register_forward_hook(lambda *_: asked.append(trainer.state.global_step))
    trainer.state.max_steps = 60
    for step in (None, 1, 30, 27):
        trainer.trial_step(batch, step)
    assert asked == [0, 27] and trainer.state.global_step == 0
    monkeypatch.setattr(trainer, "trial_step", lambda batch, step=None: time.sleep(0.6 if step is None else 0.06))
    found = forecast_of(trainer)
    assert found.step_seconds - found.loading_seconds == pytest.approx((10 * 0.6 + 50 * 0.06) / 60, rel=0.3)
    assert "as if there were no teacher_cache" in found.lines(datetime.now())[0]


# what does not fit


def test_a_batch_that_a_gpu_cannot_hold_is_refused_with_one_that_it_can(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path, per_device_train_batch_size=8)
    before = weights_of(trainer.model).clone()
    take(monkeypatch, trainer, 20 * MEBIBYTE, most=5)
    with pytest.raises(BatchSizeError, match="per_device_train_batch_size=8: .*; set .* to (5|6|7), or") as refused:
        trainer.train()
    assert "\n" not in str(refused.value) and torch.equal(weights_of(trainer.model), before)


def test_a_batch_that_the_machine_cannot_hold_is_not_even_tried(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path, per_device_train_batch_size=8)
    trainer.train_dataset.transform.augmentation = None
    seen = take(monkeypatch, trainer, 120 * MEBIBYTE)
    monkeypatch.setattr(
        memory_growth,
        "memory_to_be_had",
        lambda device, processes: memory_growth.held_memory(device) + 5 * 120 * MEBIBYTE,
    )
    with pytest.raises(BatchSizeError) as refused:
        trainer.train()
    (most,) = map(int, re.findall(r"per_device_train_batch_size to (\d+)", str(refused.value)))
    assert 3 <= most <= 5 and max(size[0] for size in seen) == 4


def test_not_even_one_image(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path)
    take(monkeypatch, trainer, 4, most=0)
    with pytest.raises(BatchSizeError, match="train on smaller images"):
        trainer.train()


def test_other_errors_pass(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path)
    take(monkeypatch, trainer, 4, most=0, error="something else")
    with pytest.raises(torch.OutOfMemoryError, match="something else"):
        trainer.train()


@pytest.mark.parametrize("probe", [True, False])
def test_auto_find_batch_size_trains_as_if_its_size_had_been_given(shapes, tmp_path, monkeypatch, probe):
    """Found by the probe, or in the first step: sampler, counts, schedule and log are those of the smaller batch."""
    given = make_trainer(shapes, tmp_path / "given", probe=probe, per_device_train_batch_size=4)
    expected = what_came(given)
    finding = make_trainer(
        shapes, tmp_path / "found", probe=probe, per_device_train_batch_size=6, auto_find_batch_size=True
    )
    step, refused = finding.training_step, []

    def training_step(model, inputs, *args, **kwargs):
        if len(inputs["pixel_values"]) > 4:
            refused.append(len(inputs["pixel_values"]))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(finding, "training_step", training_step)
    came = what_came(finding)
    assert refused == [6, 5] and finding.state.train_batch_size == 4
    assert came["logs"] == expected["logs"]
    for name in ("weights", "buffers", "random"):
        assert torch.equal(came[name], expected[name]), name
