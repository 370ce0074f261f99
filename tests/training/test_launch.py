"""What the launcher, or an option of Transformers, asks for: done, or refused by name."""

import inspect
import re
from contextlib import nullcontext
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import IncompatibleDataError, UnsupportedOptionError
from d3etr_hf.training.launch_checks import ASKED_FOR, check_launch
from d3etr_hf.training.optimization import keeps_running_statistics
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.shapes_fixture import SIDE, load_shapes, shapes_trainer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP.*--multi_gpu"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed.*--multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM.*--multi_gpu"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism configuration.*--multi_gpu"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision 'fp8'.*no, bf16, fp16"),
        ("ACCELERATE_USE_FSDP", "false", None),
        ("ACCELERATE_MIXED_PRECISION", "bf16", None),
    ],
)
def test_what_the_launcher_asks_for_is_refused_before_anything_is_built(
    tmp_path, monkeypatch, variable, value, message
):
    """Much of it is ignored otherwise: FSDP on a CPU, or in one process, trains as if nobody had asked."""
    monkeypatch.setenv(variable, value)
    if message is None:
        assert D3etrTrainingArguments(str(tmp_path), use_cpu=True).world_size == 1
        return
    with pytest.raises(UnsupportedOptionError, match=f"^the launcher asks for {message}") as caught:
        D3etrTrainingArguments(str(tmp_path), use_cpu=True)
    assert "\n" not in str(caught.value)


def test_variables_are_those_that_accelerate_reads():
    """All of its kind, but for a service that is none of weights in parts."""
    source = inspect.getsource(accelerate.accelerator) + inspect.getsource(accelerate.state)
    asked = set(re.findall(r"ACCELERATE_USE_\w+", source))
    assert asked - {"ACCELERATE_USE_CPU", "ACCELERATE_USE_SAGEMAKER"} == ASKED_FOR.keys()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_sharding_is_refused_whoever_asked_for_it(shapes, tmp_path, monkeypatch, kind):
    """HF_NOTES 25: `accelerate launch --use_fsdp` sets the environment, not the training arguments."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType[kind]))
    monkeypatch.setattr("transformers.Trainer.__init__", _only_accelerator)
    with pytest.raises(UnsupportedOptionError, match=f"{kind}.*--multi_gpu"):
        shapes_trainer(shapes, tmp_path)


@pytest.mark.parametrize(
    ("processes", "finds", "gpus", "message"),
    [
        (2, True, 1, "auto_find_batch_size=True on 2 processes"),
        (1, False, 2, "2 GPUs in this process"),
        (1, True, 1, None),
        (2, False, 1, None),
    ],
)
def test_launches_are_refused_by_what_they_are(processes, finds, gpus, message):
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=DistributedType.NO)
    args = SimpleNamespace(auto_find_batch_size=finds, n_gpu=gpus)
    with nullcontext() if message is None else pytest.raises(UnsupportedOptionError, match=message):
        check_launch(accelerator, args)


def _only_accelerator(self, model=None, args=None, **options):
    from accelerate import Accelerator

    self.accelerator, self.args = Accelerator(cpu=True), args


def test_compiled_training_has_the_same_gradients(shapes, tmp_path):
    """`torch_compile` on a backend that traces forward and backward without generating code, which takes minutes."""
    gradients = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = shapes_trainer(shapes, tmp_path, max_steps=1, max_grad_norm=0.0, optim="sgd", **options)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        gradients.append({name: value.detach() - before[name] for name, value in trainer.model.named_parameters()})
    torch._dynamo.reset()
    assert any(value.abs().max() > 0 for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: n + text)


def test_another_data_set_is_checked_when_it_is_evaluated(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path)
    other = load_shapes(shapes, "val")
    other.class_names = ["triangle", "rectangle", "circle"]
    with pytest.raises(IncompatibleDataError, match=r"\['triangle', 'rectangle', 'circle'\]"):
        trainer.evaluate(other)


def test_buffers_are_broadcast_only_where_statistics_are_kept(shapes, tmp_path):
    assert not keeps_running_statistics(tiny_model())
    assert keeps_running_statistics(torch.nn.Sequential(torch.nn.BatchNorm2d(2)))
    assert shapes_trainer(shapes, tmp_path).args.ddp_broadcast_buffers is False
    assert shapes_trainer(shapes, tmp_path, ddp_broadcast_buffers=True).args.ddp_broadcast_buffers is True
