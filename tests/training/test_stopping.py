"""A training that is asked to stop leaves a whole checkpoint from which it goes on, whatever else is saved."""

import multiprocessing
import os
import signal

import pytest
from transformers import TrainerCallback

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.training import stopping
from d3etr_hf.training.checkpoints import newest_whole_checkpoint
from d3etr_hf.training.stopping import launcher
from tests.shapes_fixture import SIDE, shapes_trainer

OPTIONS = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 100}
BEST = {"metric_for_best_model": "AP", "load_best_model_at_end": True, "save_total_limit": 1}
EVALUATED = BEST | {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


class AskAt(TrainerCallback):
    """Asks a training to stop when a step begins."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.trainer.stop.asked = True


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 10, 3, image_size=SIDE, progress=False)


def build(shapes, output, step=1000, **options):
    caller = AskAt(step)
    caller.trainer = shapes_trainer(shapes, output, callbacks=[caller], **(OPTIONS | options))
    return caller.trainer


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "no"},
        {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
        EVALUATED | {"save_strategy": "steps"},  # at its end Trainer keeps the best alone
        EVALUATED | {"save_strategy": "best"},  # the second step is none: AP stays 0
    ],
)
def test_a_training_that_is_stopped_can_go_on(shapes, tmp_path, options):
    stopped = build(shapes, tmp_path, step=2, **options)
    stopped.train()
    assert stopped.stop.stopped and stopped.state.global_step == 2
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    resumed = build(shapes, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and not resumed.stop.stopped


def test_what_is_asked_while_the_training_is_made_ready_is_not_forgotten(shapes, tmp_path):
    trainer = build(shapes, tmp_path, save_strategy="no")
    trainer.stop.asked = True
    trainer.train()
    assert trainer.state.global_step == 1 and not trainer.stop.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_pass_over_a_signal_to_all_processes(shapes, tmp_path, number):
    """Launchers send it to whole groups of processes; PyTorch gives up when a worker ends."""
    trainer = build(shapes, tmp_path, save_strategy="no", dataloader_num_workers=1)
    original, told = trainer.training_step, []

    def training_step(*args, **kwargs):
        if not told:
            told.extend(child.pid for child in multiprocessing.active_children())
            for pid in told * 2:  # a launcher hands on what all got
                os.kill(pid, number)
        return original(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert told and trainer.state.global_step == 4


@pytest.mark.parametrize("later", [False, True])
def test_a_second_signal_ends_a_worker_unless_it_was_handed_on(later):
    child = os.fork()
    if child == 0:
        stopping.HANDED_ON = -1.0 if later else 60.0
        stopping.start_worker(None, 0)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGTERM if later else 0)


def test_a_shell_that_exports_such_a_variable_is_no_launcher(monkeypatch):
    """A run that outlives it must not take its end for that of a launcher."""
    launcher.cache_clear()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launcher() is None
    launcher.cache_clear()
