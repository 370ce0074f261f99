"""A NaN stops a training, or costs it a step, and leaves a file from which the step is taken again."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from d3etr_hf.cli import reproduce
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import DamagedFileError, NonFiniteLossError, UnsupportedOptionError
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.training.kept_step import read_step
from d3etr_hf.training.reproduction import reproduce_step
from d3etr_hf.training.trainer import DistillationTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.fresh_process import REPOSITORY
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 12, 3, image_size=SIDE, progress=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model(seed=1).save_pretrained(folder)
    load_image_processor(None, SIDE, SIDE).save_pretrained(folder)
    return folder


def trainer_of(shapes, output, teacher, **options):
    """Four steps of three images, with dropout."""
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "save_strategy": "no", "logging_steps": 1} | options
    student = tiny_model(seed=2, dropout=0.1)
    return shapes_trainer(shapes, output, student=student, teacher=type(student).from_pretrained(teacher), **options)


def spoil_term(trainer, step, name="student/class", layer=1):
    """Have one layer's value of a loss term be NaN in a step, with no gradient of its own."""
    original = trainer.objective.__class__.__call__

    class Spoilt(trainer.objective.__class__):
        def __call__(self, *arguments):
            terms, statistics = original(self, *arguments)
            if trainer.state.global_step + 1 == step:
                factor = torch.ones(len(terms[name]))
                factor[layer] = torch.nan
                terms[name] = terms[name] * factor
            return terms, statistics

    trainer.objective.__class__ = Spoilt


def spoil_gradient(trainer, step):
    """Have one parameter's gradient be NaN in a step, though every loss term is finite."""
    parameter = trainer.model.bbox_predictor.layers[0].weight

    def spoil(gradient):
        return gradient * torch.nan if trainer.model.training and trainer.state.global_step + 1 == step else gradient

    parameter.register_hook(spoil)


def test_a_term_that_is_not_finite_is_named_with_its_layer_and_images(shapes, tmp_path, teacher):
    trainer = trainer_of(shapes, tmp_path, teacher)
    spoil_term(trainer, 3)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.train()
    path = tmp_path / "not_finite" / "step_3_rank_0.safetensors"
    kept, _, batch = read_step(path)
    ids = [label["image_id"] for label in kept.labels]
    assert re.match(
        rf"step 3, image ids {re.escape(str(ids))}: loss term student/class \(layer 1\) is NaN", str(stopped.value)
    )
    assert str(stopped.value).endswith(f"d3etr reproduce {path}") and "\n" not in str(stopped.value)
    assert batch.inputs["pixel_values"].shape[0] == 3


def test_a_gradient_that_is_not_finite_reaches_no_weight(shapes, tmp_path, teacher):
    trainer = trainer_of(shapes, tmp_path, teacher)
    spoil_gradient(trainer, 2)
    with pytest.raises(NonFiniteLossError, match=r"step 2.*every loss term is finite, but the gradient is NaN"):
        trainer.train()
    assert weights_of(trainer.model).isfinite().all()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("spoil", [spoil_term, spoil_gradient])
def test_a_step_is_skipped_as_if_its_rate_had_been_zero(shapes, tmp_path, teacher, caplog, spoil, accumulated):
    """No weight, and nothing of the optimizer's, changes by it; the log's means are of the others."""
    options = {"gradient_accumulation_steps": accumulated, "num_train_epochs": 4, "max_steps": 3}
    trainer = trainer_of(shapes, tmp_path, teacher, skip_nonfinite_steps=1, **options)
    weights = []
    spoil(trainer, 2)
    record = trainer.callback_handler.on_step_end

    def on_step_end(args, state, control):
        states = [value["exp_avg_sq"].sum() for value in trainer.optimizer.state.values()]
        weights.append((weights_of(trainer.model), torch.stack(states).sum()))
        return record(args, state, control)

    trainer.callback_handler.on_step_end = on_step_end
    trainer.train()
    assert torch.equal(weights[1][0], weights[0][0]) and torch.equal(weights[1][1], weights[0][1])
    assert not torch.equal(weights[2][0], weights[1][0]) and weights[2][0].isfinite().all()
    assert "the step is skipped (1 of at most 1)" in caplog.text
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in logs] == [0, 1, 1]
    assert all(value == value for entry in (logs[0], logs[2]) for value in entry.values())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_of_a_skipped_step_stays_in_statistics_or_average(shapes, tmp_path, accumulated):
    """Batch norm counts in the forward pass, before anybody knows."""
    student = tiny_model(seed=2, model_type="rt_detr")
    batches = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 2}
    options = {"skip_nonfinite_steps": 1, "ema_decay": 0.5, "ema_warmup_steps": 0, "logging_steps": 1}
    trainer = shapes_trainer(shapes, tmp_path, student=student, teacher=None, max_steps=3, **batches, **options)

    original, seen = trainer._prepare_inputs, {}

    def prepare(inputs):
        inputs = original(inputs)
        if trainer.state.global_step == 1:
            inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
        return inputs

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = {name: b.clone() for name, b in trainer.model.named_buffers()}

    trainer._prepare_inputs = prepare
    trainer.add_callback(Keep())
    trainer.train()
    statistics = [name for name in seen[1] if name.endswith(("running_mean", "running_var"))]
    assert statistics and any(not torch.equal(seen[2][name], seen[3][name]) for name in statistics)
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in statistics)
    assert all(value.isfinite().all() for value in trainer.weight_average.values.values())
    _, state, _ = read_step(next((tmp_path / "not_finite").iterdir()))
    assert all(value.isfinite().all() for value in state.values())


def test_a_run_that_goes_on_has_skipped_what_it_had(shapes, tmp_path, teacher):
    options = {"skip_nonfinite_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(shapes, tmp_path, teacher, **(options | {"max_steps": 2}))
    spoil_term(trainer, 2)
    trainer.train()
    again = trainer_of(shapes, tmp_path, teacher, **options)
    spoil_term(again, 3)
    with pytest.raises(NonFiniteLossError, match="1 steps were skipped before it"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    earlier = trainer_of(shapes, tmp_path, teacher, **(options | {"max_steps": 2}))
    spoil_term(earlier, 2)
    earlier.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_step_that_two_processes_kept_is_one(shapes, tmp_path, teacher):
    trainer = trainer_of(shapes, tmp_path, teacher, skip_nonfinite_steps=3)
    trainer.guard.folder.mkdir()
    for step, rank in ((2, 0), (2, 1), (3, 1), (5, 0)):
        (trainer.guard.folder / f"step_{step}_rank_{rank}.safetensors").touch()
    trainer.state.global_step = 4
    trainer.guard.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.guard.skipped == 2


def test_no_more_steps_are_skipped_than_may_be(shapes, tmp_path, teacher):
    trainer = trainer_of(shapes, tmp_path, teacher, skip_nonfinite_steps=1)
    spoil_term(trainer, 2)
    spoil_gradient(trainer, 3)
    with pytest.raises(NonFiniteLossError, match="1 steps were skipped before it, as many as may be"):
        trainer.train()
    assert len(list((tmp_path / "not_finite").iterdir())) == 2


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("conditional_detr", {"bf16": True}),
        ("rt_detr", {}),
        ("conditional_detr", {"distillation_interval": 3}),  # so that it is a step without distillation
        ("conditional_detr", {"distillation_decay": True}),
    ],
)
def test_a_kept_step_is_taken_again_bit_by_bit(shapes, tmp_path, teacher, model_type, changes, monkeypatch, capsys):
    """Dropout, denoising, random queries and a teacher's queries of the image: every term is what it was."""
    folder = tmp_path / "teacher"
    tiny_model(seed=1, model_type=model_type).save_pretrained(folder)
    student = tiny_model(seed=2, model_type=model_type, dropout=0.1)
    options = {"detection_weight": 2.0, "prediction_weight": 0.5, "max_steps": 4} | changes
    options |= {"shared_query_weight": 1.0, "shared_random_queries": 6, "seed": 3}
    trainer = shapes_trainer(
        shapes, tmp_path, student=student, teacher=type(student).from_pretrained(folder), **options
    )
    values = {}
    watch = trainer.guard.watch

    def keep(terms):
        trust = watch(terms)
        values[trainer.state.global_step + 1] = trainer.guard.values()
        return trust

    monkeypatch.setattr(trainer.guard, "watch", keep)
    parameter = next(p for n, p in student.named_parameters() if "bbox" in n and p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * torch.nan if trainer.state.global_step == 2 else gradient)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.train()
    path = str(stopped.value).rsplit(" ", 1)[-1]
    torch.manual_seed(99)
    found = reproduce_step(path, use_cpu=True)
    assert found.terms == values[3] and found.weights == found.gradients == found.modules == []
    monkeypatch.setattr(sys, "argv", ["d3etr reproduce", path, "--use_cpu", "true"])
    reproduce.main()
    said = capsys.readouterr().out
    assert "step 3, rank 0 of 1" in said and all(name in said for name in found.terms)


def test_where_a_nan_begins_is_found(shapes, tmp_path, teacher):
    trainer = trainer_of(shapes, tmp_path, teacher)
    with torch.no_grad():
        trainer.model.model.decoder.layers[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"image ids \[\d+\]: .*matching cost of decoder layer 1") as stopped:
        trainer.train()
    found = reproduce_step(str(stopped.value).rsplit(" ", 1)[-1], use_cpu=True)
    assert len(found.weights) == 1 and found.weights[0].endswith("decoder.layers.1.mlp.fc1.weight")
    (module,) = found.modules  # what follows makes NaN of NaN
    assert module.endswith("decoder.layers.1.mlp.fc1 (Linear)") and "matching cost" in found.refused


@pytest.mark.parametrize("use_cpu", [False, True])
def test_the_accelerator_is_left_alone_where_that_is_asked_for(shapes, tmp_path, teacher, monkeypatch, use_cpu):
    trainer = trainer_of(shapes, tmp_path, teacher)
    spoil_gradient(trainer, 1)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.train()
    asked = []
    post_init = D3etrTrainingArguments.__post_init__
    monkeypatch.setattr(
        D3etrTrainingArguments, "__post_init__", lambda self: (asked.append(self.use_cpu), post_init(self))[1]
    )
    path = str(stopped.value).rsplit(" ", 1)[-1]
    monkeypatch.setattr(sys, "argv", ["d3etr reproduce", path, "--use_cpu", str(use_cpu)])
    reproduce.main()
    assert asked == [use_cpu]


def test_gradients_that_are_not_finite_are_found(shapes, tmp_path, teacher, monkeypatch):
    """Of finite terms: here by a loss that is multiplied after them."""
    trainer = trainer_of(shapes, tmp_path, teacher)
    spoil_gradient(trainer, 1)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.train()
    compute_loss = DistillationTrainer.compute_loss
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lambda *a, **k: compute_loss(*a, **k) * torch.nan)
    found = reproduce_step(str(stopped.value).rsplit(" ", 1)[-1], use_cpu=True)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert found.gradients and set(found.gradients) <= trained and found.modules == []
    assert f"gradient is not finite: {found.gradients[0]}" in reproduce.report(found)


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from tests.fresh_process import REPOSITORY
from tests.shapes_fixture import shapes_trainer, weights_of
from tests.training.test_non_finite import spoil_term
from d3etr_hf.errors import NonFiniteLossError
shapes, output = map(Path, sys.argv[1:])
options = {"teacher": None, "per_device_train_batch_size": 2, "skip_nonfinite_steps": 1}
trainer = shapes_trainer(shapes, output, max_steps=4, ddp_backend="gloo", **options)
if trainer.args.process_index == 1:
    spoil_term(trainer, 2)
    spoil_term(trainer, 4)
try:
    trainer.train()
except NonFiniteLossError as error:
    print(error.of_all_processes, weights_of(trainer.model).sum().item(), str(error))
"""


def test_processes_skip_and_stop_together(shapes, tmp_path):
    """By what one of them has seen, which all tell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(shapes), str(tmp_path)],
            env=os.environ | common | {"PYTHONPATH": str(REPOSITORY), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert said[0] == said[1]
    found = re.fullmatch(r"True (\S+) rank 1, step 4, image ids .*: loss term student/class \(layer 1\).*", said[0])
    assert float(found[1]) == float(found[1]) and "1 steps were skipped before it" in said[0]
    kept = sorted(path.name for path in (tmp_path / "not_finite").iterdir())
    assert kept == ["step_2_rank_1.safetensors", "step_4_rank_1.safetensors"]


def test_what_is_no_kept_step_is_refused(tmp_path, teacher):
    (tmp_path / "cut").write_bytes((teacher / "model.safetensors").read_bytes()[:100])
    for path in (tmp_path / "cut", teacher / "model.safetensors", tmp_path, tmp_path / "nothing"):
        with pytest.raises(DamagedFileError, match=re.escape(str(path))) as refused:
            reproduce_step(path)
        assert "\n" not in str(refused.value)


def test_a_step_of_another_version_is_refused(shapes, tmp_path, teacher):
    """By its options, which may have been renamed since."""
    trainer = trainer_of(shapes, tmp_path, teacher)
    spoil_term(trainer, 1)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    (path,) = (tmp_path / "not_finite").iterdir()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["d3etr_step"])
    for options in ({"gone_weight": 1.0}, {"detection_weight": -1.0}):
        changed = told | {"options": told["options"] | options}
        save_file(tensors, path, {"d3etr_step": json.dumps(changed)})
        with pytest.raises(DamagedFileError, match=f"{path} holds options that are none of this version") as refused:
            reproduce_step(path, use_cpu=True)
        assert "\n" not in str(refused.value)


def test_the_scaler_of_float16_needs_no_such_option(shapes, tmp_path, teacher, monkeypatch):
    trainer = trainer_of(shapes, tmp_path, teacher)
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu"))
    trainer.args.skip_nonfinite_steps = 1
    with pytest.raises(UnsupportedOptionError, match="skip_nonfinite_steps=1: float16"):
        trainer._add_callbacks()
