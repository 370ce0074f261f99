"""The notebook runs from its first cell to its last, with small values in its cell of constants."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "own_data.ipynb"
SMALL = {
    "TRAIN_IMAGES, VAL_IMAGES": "8, 4",
    "SIDE": "64",
    "TEACHER_STEPS, STUDENT_STEPS": "4, 2",
    "BATCH, EVALUATE_EVERY": "2, 2",
}


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_every_cell_runs(tmp_path, monkeypatch):
    """The table of a training shows few columns, and no loss that is not computed."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (constants,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in SMALL.items():
        constants.source, changed = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", constants.source, flags=re.M)
        assert changed == 1, name
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    table = "".join(output.data.get("text/html", "") for output in outputs["student"] if "data" in output)
    columns = re.findall(r"<th>(.*?)</th>", table)
    assert columns == ["Step", "Loss", "Auxiliary group", "Student group", "AP", "AP50"] and "No log" not in table
    pictures = [output.data.get("image/png") for output in outputs["pictures"] if "data" in output]
    assert len(list(filter(None, pictures))) == 2
    (prediction,) = (each.data["text/plain"] for each in outputs["predict"] if each.output_type == "execute_result")
    assert "own_data/val/000001.png" in prediction and "detections" in prediction
    assert "model.safetensors" in "".join(output.get("text", "") for output in outputs["publish"])
