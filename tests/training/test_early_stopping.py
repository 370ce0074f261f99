"""A training ends when it gets no better, and an interrupted one ends where the uninterrupted one would have."""

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.training.early_stopping import since_best
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of

# by evaluation, one a step: no better than that of step 2 in three evaluations, then it would be
FIGURES = [0.1, 0.3, 0.2, 0.3, 0.1, 0.9, 0.9, 0.9]
OPTIONS = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


def trainer_of(shapes, output, monkeypatch, **options):
    """One whose evaluations give these figures."""
    trainer = shapes_trainer(shapes, output, teacher=None, early_stopping_patience=3, **(OPTIONS | options))
    trainer.compute_metrics = lambda prediction: {"AP": FIGURES[trainer.state.global_step - 1]}
    return trainer


@pytest.mark.parametrize("stopped_at", [3, 4, 5])
def test_the_count_goes_on_with_the_run(shapes, tmp_path, monkeypatch, caplog, stopped_at):
    """Interrupted before the last evaluation, or after it and before anything else: not one more step is taken."""
    whole = trainer_of(shapes, tmp_path / "whole", monkeypatch)
    whole.train()
    assert whole.state.global_step == 5 and whole.args.metric_for_best_model == "AP"
    assert "stopped after step 5: in 3 evaluations AP was no better than 0.3000; --load_best" in caplog.text
    output = tmp_path / "stopped"
    first = trainer_of(shapes, output, monkeypatch)
    original = first._save_checkpoint

    def save_and_end(*args, **kwargs):
        original(*args, **kwargs)
        if first.state.global_step == stopped_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(first, "_save_checkpoint", save_and_end)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer_of(shapes, output, monkeypatch)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 5
    assert torch.equal(weights_of(second.model), weights_of(whole.model))


def test_the_best_weights_where_asked_for(shapes, tmp_path, monkeypatch):
    trainer = trainer_of(shapes, tmp_path, monkeypatch, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience=2, eval_strategy='no': nothing is evaluated that"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "early_stopping_patience=0: must be from 1"),
        (
            {"early_stopping_patience": 2, "eval_strategy": "epoch", "metric_for_best_model": "eval_loss"},
            "evaluation computes average precision, and no loss",
        ),
    ],
)
def test_what_could_not_stop_a_training_is_refused(tmp_path, options, message):
    with pytest.raises(UnsupportedOptionError, match=message):
        D3etrTrainingArguments(str(tmp_path), **options)


def test_evaluations_since_the_best():
    assert [since_best(FIGURES[:count], True) for count in range(7)] == [0, 0, 0, 1, 2, 3, 0]
    assert since_best([0.3, 0.1, 0.2], False) == 1
