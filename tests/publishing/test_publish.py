"""What publishing leaves as it was, and what it keeps of an earlier publication."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest

from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import PrivacyError, PublishError
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.measurements import METRICS
from d3etr_hf.publishing.publish import PublishArguments, copy_of, publish, write_model_card
from d3etr_hf.publishing.run_folder import hash_of_weights
from d3etr_hf.publishing.upload import describe_upload, files_to_publish
from tests.cli.test_training_run import arguments
from tests.data.test_hub_datasets import row, write_parquet


def content_of(folder) -> dict:
    """Every file below a folder, with what it holds and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("measured", [True, False])
def test_dry_run_changes_nothing(prepared, distilled, measured):
    """Neither a card with its comparison, nor a run that was never measured, pictures and all; it tells of both."""
    folder = distilled
    if measured:
        shutil.copytree(prepared, folder, dirs_exist_ok=True)
    before = content_of(folder)
    told = publish(PublishArguments(str(folder), repo_id="user/student", dry_run=True), CardArguments())
    assert content_of(folder) == before and {*folder.rglob("*")} >= before.keys()
    lines = told.splitlines()
    assert lines[0].endswith(f"/user/student would go, from {folder}:")
    listed = {line.split()[0] for line in lines[1:-2]}
    assert listed >= {"README.md", "metrics.json", "detections.png", "curves.png", "model.safetensors"}
    assert "checkpoint-2/" in lines[-1] and "run.yaml" in lines[-1]


def test_errors_of_a_dry_run_name_the_folder(distilled):
    (distilled / "results.json").unlink()
    with pytest.raises(PublishError, match=f"^{re.escape(str(distilled))} holds no results.json"):
        publish(PublishArguments(str(distilled), dry_run=True), CardArguments())


def test_copy_is_written_into_alone(distilled):
    """Also where a file is replaced that the folder has."""
    before = content_of(distilled)
    with copy_of(distilled) as copy:
        assert copy.name == distilled.name
        write_model_card(copy)
        assert (copy / "README.md").exists() and (copy / "model.safetensors").read_bytes()
    assert content_of(distilled) == before and not copy.exists()


def test_comparisons_stay_until_they_are_taken_out(prepared, finished_runs, tmp_path):
    """Nothing said keeps them; `none` and other ones replace them."""
    folder = shutil.copytree(prepared, tmp_path / "student")
    row = json.loads((folder / METRICS).read_text())["compared"]["student alone"]
    card = write_model_card(folder, repo_id="user/student")
    assert json.loads((folder / METRICS).read_text())["compared"] == {"student alone": row}
    assert "student alone |" in card.read_text() and 'model="user/student"' in card.read_text()
    # another place of the teacher measures it and the student anew, and not what is compared with them
    write_model_card(folder, teacher=str(finished_runs / "alone"))
    metrics = json.loads((folder / METRICS).read_text())
    assert metrics["compared"] == {"student alone": row} and metrics["teacher"]["name"] == "alone"
    card = write_model_card(folder, CardArguments(compare=["none"]))
    assert "compared" not in json.loads((folder / METRICS).read_text()) and "student alone" not in card.read_text()


def test_comparisons_that_cannot_be_measured_anew_are_not_lost(prepared, tmp_path, finished_runs):
    """Of other data, or all anew: they must be named again, before anything is done."""
    folder = shutil.copytree(prepared, tmp_path / "student")
    before = content_of(folder)
    data = DataArguments(data_folder=str(finished_runs / "data"))
    for again in ({"measure_again": True}, {"data": data}):
        with pytest.raises(
            PublishError, match="measured anew, and of student alone nothing .* or give --compare none"
        ):
            write_model_card(folder, **again)
    assert content_of(folder) == before


@pytest.mark.parametrize(("name", "told"), [("run.yaml", "is a file: name the folder"), ("absent", "no such folder")])
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_no_folder_is_named(distilled, name, told, dry_run):
    place = str(distilled / name)
    with pytest.raises(PublishError, match=f"^{re.escape(place)}.*{told}"):
        publish(PublishArguments(place, dry_run=dry_run), CardArguments())


@pytest.mark.parametrize("below_home", [False, True])
def test_no_path_of_local_parquet_is_published(tmp_path, monkeypatch, below_home):
    """Trained from an absolute path, below the home or on a mounted disk; with a check of an earlier version."""
    place = tmp_path / "ClientOfOurs" / "parts"
    place.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path if below_home else tmp_path / "home"))
    rows = [row(index, [{"bbox": [1.0, 2.0, 10.0, 20.0], "category": 1}]) for index in range(8)]
    for split in ("train", "validation"):
        write_parquet(place, rows, split, fields=("bbox", "category"))
    model, teacher, data, training = arguments("", tmp_path / "student", max_steps=1)
    data = replace(data, data_folder=None, dataset_name=f"{place}/")
    train_detector(model, teacher, data, training)
    folder = tmp_path / "student"
    (folder / "model.onnx").write_bytes(b"onnx")
    check = {"data": f"{place}/validation", "weights": hash_of_weights(folder)}
    check |= {"onnx": hashlib.sha256(b"onnx").hexdigest(), "images": 8, "takes": "images of any size", "threads": 1}
    check["differences"] = {"one_by_one": {"box_pixels": 0.25, "score": 2e-6}}
    check["milliseconds"] = {"pytorch": 2.0, "onnxruntime": 1.0}
    (folder / "onnx_check.json").write_text(json.dumps({"model.onnx": check}))
    publish(PublishArguments(str(folder)), CardArguments(license="mit"))
    assert str(place) in (folder / "run.yaml").read_text()  # it was there to leak
    paths = files_to_publish(folder)
    assert {"README.md", "onnx_check.json", "training.yaml", "metrics.json"} <= {path.name for path in paths}
    for path in paths:
        assert b"ClientOfOurs" not in path.read_bytes(), path.name
    assert "On the 8 images of parts/validation." in (folder / "README.md").read_text()
    (folder / "onnx_check.json").write_text(json.dumps(check))  # the net before an upload, where the first is torn
    with pytest.raises(PrivacyError, match="onnx_check.json holds"):
        describe_upload(folder, None)
