"""What the launcher, or an option of Transformers, asks for: done, or refused by name."""

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import IncompatibleDataError, UnsupportedOptionError
from d3etr_hf.training.optimization import keeps_running_statistics
from tests.shapes_fixture import SIDE, load_shapes, shapes_trainer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharding_is_refused_whoever_asked_for_it(shapes, tmp_path, monkeypatch, kind):
    """HF_NOTES 25: `accelerate launch --use_fsdp` sets the environment, not the training arguments."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType[kind]))
    monkeypatch.setattr("transformers.Trainer.__init__", _only_accelerator)
    with pytest.raises(UnsupportedOptionError, match=f"{kind}.*--multi_gpu"):
        shapes_trainer(shapes, tmp_path)


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
