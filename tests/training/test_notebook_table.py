"""The table in a notebook: few columns, filled from what a training logs."""

import pytest

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.training import progress
from tests.shapes_fixture import SIDE, shapes_trainer

pytest.importorskip("IPython")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


@pytest.mark.parametrize("evaluates", [True, False])
def test_step_losses_and_average_precision(shapes, tmp_path, monkeypatch, evaluates):
    """Guards one column a class, and "No log" for a loss that is not computed."""
    from transformers.utils import notebook

    from d3etr_hf.training.notebook_table import NotebookTable

    shown = []
    monkeypatch.setattr(notebook.disp, "display", lambda content, **options: None)
    monkeypatch.setattr(notebook, "text_to_html_table", lambda items: shown.append([list(row) for row in items]) or "")
    options = {"eval_strategy": "steps", "eval_steps": 2} if evaluates else {}
    trainer = shapes_trainer(shapes, tmp_path, max_steps=4, **options)
    trainer.pop_callback(progress.LogLines)
    trainer.add_callback(NotebookTable())
    trainer.train()
    columns, *rows = shown[-1]
    scores = ["AP", "AP50"] if evaluates else []
    assert columns == ["Step", "Loss", "Auxiliary group", "Student group", *scores]
    assert [row[0] for row in rows] == ([2, 4] if evaluates else [1, 2, 3, 4])
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    for step, loss, *groups in rows:
        assert loss == history[step]["loss"] == pytest.approx(sum(groups[:2]), rel=1e-5)
    if evaluates:
        last = [entry for entry in trainer.state.log_history if "eval_AP" in entry][-1]
        assert rows[-1][4:] == [last["eval_AP"], last["eval_AP50"]]
    trainer.evaluate()  # outside of training there is no table to add to
    assert shown[-1] == [columns, *rows]
