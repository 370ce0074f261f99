"""Every option of training works, or is refused in one line that names it, before anything long."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CommandLineError, UnsupportedOptionError, UserError
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.shapes_fixture import SIDE, load_shapes, shapes_trainer

REPOSITORY = Path(__file__).resolve().parents[2]
BEST = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


def options(output, **changes) -> D3etrTrainingArguments:
    return D3etrTrainingArguments(**({"output_dir": str(output), "use_cpu": True} | changes))


def test_every_option_with_odd_values_is_taken_or_refused_in_one_line():
    """All fields, a dozen values each and every choice: in a process of its own, since some change global state."""
    walk = [sys.executable, str(REPOSITORY / "scripts" / "walk_options.py")]
    result = subprocess.run(walk, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    counted = {end: int(count) for count, end in re.findall(r"^ +(\d+) (\w+)$", result.stdout, re.MULTILINE)}
    assert set(counted) == {"accepted", "refused"} and counted["accepted"] > 200 and counted["refused"] > 1500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed=-1: must be from 0 to "),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be from 1"),
        ({"auxiliary_groups": 0, "auxiliary_queries": "learned"}, "auxiliary_groups=0: must be from 1 to 32"),
        ({"auxiliary_groups": 3}, "auxiliary_groups=3, auxiliary_queries='teacher': only learned"),
        ({"matching_score_threshold": 1.5}, "matching_score_threshold=1.5: must be from 0 to 1"),
        ({"logits_layer_weights": [1.0, -1.0]}, r"logits_layer_weights=\[1.0, -1.0\]: must be numbers of 0 or more"),
        (
            {"logits_distillation_weight": 1.0, "adaptive_matching": False},
            "logits_distillation_weight=1.0, adaptive_matching=False: .*set adaptive_matching to true",
        ),
        ({"shared_object_queries": True}, "shared_object_queries=True, shared_query_weight=0.0: no loss is of them"),
        (
            {"shared_query_weight": 1.0, "shared_random_queries": 0, "shared_teacher_queries": False},
            "shared_random_queries=0, shared_teacher_queries=False, shared_object_queries=False: there are no queries",
        ),
        ({"optim": "galore_adamw"}, "optim='galore_adamw': cannot be built .*ImportError"),
        ({"optim_args": "nonsense"}, "optim='adamw_torch_fused', optim_args='nonsense': cannot be built"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type='warmup_stable_decay': cannot be built .*decay",
        ),
        ({"lr_scheduler_kwargs": {"cycles": 1}}, "lr_scheduler_kwargs=.*'cycles'.*cannot be built"),
        ({"report_to": "comet_ml"}, "report_to=.*'comet_ml'.*cannot be built"),
        ({"report_to": "nonsense"}, "report_to=.*nonsense is not supported"),
        ({"metric_for_best_model": "loss", **BEST}, "metric_for_best_model='loss': .*take AP"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True, dataloader_num_workers=0"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor=2, dataloader_num_workers=0"),
        ({"torch_compile": True, "torch_compile_backend": "slow"}, "torch_compile_backend='slow': cannot be built"),
        ({"tf32": True}, "tf32"),
        ({"do_train": False}, "do_train=False: is not supported: .*d3etr evaluate"),
        ({"do_eval": False}, "do_eval=False: is not supported: a run ends with an evaluation"),
        ({"do_predict": True}, "do_predict=True: is not supported: .*d3etr visualize"),
        ({"teacher_cache": ""}, "teacher_cache='': name a folder"),
        (
            {"distillation_interval": 2, "ddp_static_graph": True},
            "ddp_static_graph=True, distillation_interval=2, .*not alike",
        ),
        ({"fsdp": "full_shard"}, "fsdp='full_shard': is not supported: .*accelerate launch"),
        ({"deepspeed": {"zero": 1}}, "deepspeed=.*is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: is not supported"),
        ({"logging_steps": 0}, "logging_steps=0: must be a number of steps"),
        ({"max_steps": 0}, "max_steps=0: must be 1 or more"),
        ({"num_train_epochs": 0}, "num_train_epochs=0, max_steps=-1: not one step would be trained"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a finite number"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4': must be of type float"),
        ({"accelerator_config": {"split": 1}}, "accelerator_config={'split': 1}: Accelerate does not take it"),
        ({"activation_checkpointing_kwargs": {"reentrant": 1}}, "knows no reentrant"),
        ({"metric_for_best_model": "x" * 900 + "loss", **BEST}, "^.{1,300}$"),
        ({"debug": "underflow_overflow"}, "debug='underflow_overflow': is not supported"),
        ({"fp16": True}, "fp16=True needs a GPU"),
    ],
)
def test_refusals_name_the_option_and_the_way_out(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        options(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_float16_of_the_launcher_needs_a_gpu_too(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision fp16` sets nothing but this variable."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UnsupportedOptionError, match="fp16=True needs a GPU"):
        options(tmp_path)


def test_upload_without_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr("d3etr_hf.training.option_checks.get_token", lambda: None)
    with pytest.raises(UnsupportedOptionError, match="push_to_hub=True, hub_token=None: there is no token.*HF_TOKEN"):
        options(tmp_path, push_to_hub=True)
    assert options(tmp_path, push_to_hub=True, hub_token="hf_1").push_to_hub


def test_the_command_line_shows_the_same(tmp_path):
    with pytest.raises(CommandLineError, match="^command line: fp16=True needs a GPU"):
        parse_arguments([D3etrTrainingArguments], ["--output_dir", str(tmp_path), "--use_cpu", "--fp16", "true"])


def test_options_that_are_built_do_not_touch_the_random_numbers(tmp_path):
    """A run's options are built before and after its seed is set."""
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    options(tmp_path, lr_scheduler_type="cosine")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"save_strategy": "steps", "save_steps": 0.5},
        {"logging_steps": 0.5},
        {"eval_strategy": "steps", "eval_steps": 0.5, "eval_delay": 5},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1},
        {"optim": "adafactor", "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.0, "adam_beta1": 0},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_AP50"},
        {"accelerator_config": {"split_batches": True}, "torch_empty_cache_steps": 1},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": False}},
        {"train_sampling_strategy": "sequential", "full_determinism": False},
        {"auto_find_batch_size": True, "save_only_model": True, "eval_accumulation_steps": 1, "eval_on_start": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 8},
    ],
)
def test_what_is_accepted_trains(shapes, tmp_path, changes):
    trainer = shapes_trainer(shapes, tmp_path, **({"max_steps": 2} | changes))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps > 0


# what depends on the data


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (3, {"dataloader_drop_last": True}, "dataloader_drop_last=True, per_device_train_batch_size=4 .* 3 images"),
        (0, {}, "train_dataset holds no image"),
    ],
)
def test_not_one_step_is_refused_before_training(shapes, tmp_path, images, changes, message):
    train = load_shapes(shapes, "train").select(range(images))
    with pytest.raises(UnsupportedOptionError, match=message):
        shapes_trainer(shapes, tmp_path, train=train, **changes)


@pytest.mark.parametrize("metric", ["accuracy", "AP/hexagon", "eval_AP51"])
def test_a_best_model_by_a_figure_that_evaluation_does_not_give(shapes, tmp_path, metric):
    with pytest.raises(UserError, match=f"metric_for_best_model='{metric.removeprefix('eval_')}': .*AP, AP50.*AP/"):
        shapes_trainer(shapes, tmp_path, metric_for_best_model=metric, **BEST)


def test_evaluation_leaves_no_trace_in_what_is_saved(shapes, tmp_path):
    """Bit for bit: with dropout, with averaged weights and at the best, and a final evaluation before saving."""
    from safetensors.torch import load_file

    from tests.tiny import tiny_model

    saved = []
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "torch_empty_cache_steps": 1}
    for number, options in enumerate(({}, evaluated, evaluated | {"bf16": False, "dataloader_num_workers": 1})):
        output = tmp_path / str(number)
        trainer = shapes_trainer(
            shapes, output, student=tiny_model(seed=2, dropout=0.3), max_steps=3, ema_decay=0.9, **options
        )
        trainer.train()
        if options:
            trainer.evaluate()
        trainer.save_model(output)
        saved.append(load_file(output / "model.safetensors"))
    for other in saved[1:]:
        assert saved[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in saved[0].items())
    assert json.loads((tmp_path / "0" / "config.json").read_text())["dtype"] == "float32"
