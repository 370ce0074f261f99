"""The card says what was measured, and no more; the Hub's own parser reads it back."""

import copy
import hashlib
import json
import re
import runpy
import shutil

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import read_yaml, write_yaml
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import PublishError
from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.card import CardArguments, card_data, write_card
from d3etr_hf.publishing.measurements import METRICS
from d3etr_hf.publishing.publish import PublishArguments, publish, write_model_card
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


@pytest.fixture
def metrics(prepared):
    return json.loads((prepared / METRICS).read_text())


def test_model_index_is_what_the_run_measured(prepared):
    """Every COCO metric of results.json, to the last bit."""
    results = json.loads((prepared / "results.json").read_text())
    card = ModelCard.load(prepared / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: value for name, value in results.items() if name.startswith(("AP", "AR"))}
    assert found.keys() >= {"AP", "AP50", "AP75", "AR_100"}
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "object-detection"
    assert card.data.license == "mit"
    assert {"knowledge-distillation", "conditional-detr"} <= {*card.data.tags}
    assert "A Conditional DETR object detector" in card.text
    assert D3etrConditionalDetrForObjectDetection.citation in card.text
    # nothing that has no address on the Hub is linked
    assert card.data.base_model is None and card.data.datasets is None
    assert "!!" not in (prepared / "README.md").read_text()


@given(values=st.lists(st.floats(0, 1), min_size=11, max_size=11))
def test_any_value_survives(values):
    metrics = minimal_metrics()
    metrics["student"]["metrics"] = dict(zip([f"metric {index}" for index in range(11)], values, strict=True))
    data = card_data(metrics, CardArguments(), "name")
    parsed = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert [result.metric_value for result in parsed.eval_results] == values


OPTIONS = {
    "auxiliary_queries": "teacher",
    "adaptive_matching": True,
    "fixed_matching": True,
    "self_attention_weight": 1.0,
    "cross_attention_weight": 1.0,
    "prediction_weight": 1.0,
}


FAMILY = {"title": "Conditional DETR", "tag": "conditional-detr", "citation": "@inproceedings{own}"}


def minimal_metrics() -> dict:
    split = {"name": "x/val", "images": 2, "objects": 3, "classes": {"a": 3}, "sizes": {}}
    return {
        "name": "student",
        "student": {"metrics": {"AP": 0.5}, "backbone": "convnext", "family": FAMILY},
        "data": {"train": split, "val": split},
        "training": {"options": OPTIONS, "inherited": []},
        "links": {},
    }


@pytest.mark.parametrize(
    ("links", "arguments", "base_model", "datasets"),
    [
        ({}, {}, None, None),
        ({"teacher": "a/teacher", "dataset": "b/data"}, {}, "a/teacher", ["b/data"]),
        ({"teacher": "a/teacher"}, {"teacher_id": "c/better", "dataset_id": "d/data"}, "c/better", ["d/data"]),
        ({"started_from": "e/start"}, {}, "e/start", None),
    ],
)
def test_links(links, arguments, base_model, datasets):
    """Given ids, else those the run loaded from; a local folder is never linked."""
    data = card_data(minimal_metrics() | {"links": links}, CardArguments(**arguments), "name").to_dict()
    assert data.get("base_model") == base_model
    assert data.get("datasets") == datasets
    assert data.get("base_model_relation") == ("finetune" if base_model else None)


def test_second_run_gives_the_same_bytes(prepared, finished_runs):
    """Figures, pictures and card: nothing is measured or drawn again, and nothing depends on the hour."""
    names = ("README.md", "metrics.json", "training.yaml", "curves.png", "detections.png", "attention.png")
    before = {name: (prepared / name).read_bytes() for name in names}
    arguments = CardArguments(license="mit", compare=[f"student alone={finished_runs / 'alone'}"])
    publish(PublishArguments(str(prepared)), arguments)
    assert {name: (prepared / name).read_bytes() for name in names} == before


def test_pictures_are_drawn_alike(prepared, finished_runs, tmp_path):
    """One that is missing is drawn again, to the same bytes."""
    folder = shutil.copytree(prepared, tmp_path / "student")
    names = ("curves.png", "detections.png", "attention.png")
    for name in names:
        (folder / name).unlink()
    publish(PublishArguments(str(folder)), CardArguments())
    for name in names:
        assert (folder / name).read_bytes() == (prepared / name).read_bytes(), name


def test_card_needs_neither_models_nor_data_again(prepared, tmp_path):
    """What a failed upload left behind is published later, wherever teacher and data are by then."""
    folder = shutil.copytree(prepared, tmp_path / "elsewhere")
    configuration = read_yaml((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(write_yaml(configuration | {"teacher": "gone", "data_folder": "gone"}))
    write_model_card(folder, repo_id="user/student")
    assert "user/student" in (folder / "README.md").read_text()


def test_onnx_file_of_other_weights_is_not_published(prepared, metrics, tmp_path):
    """Checked by scripts/export.py on these weights it is told of in the card; else nothing is published."""
    folder = shutil.copytree(prepared, tmp_path / "model")
    assert "onnx" not in (folder / "README.md").read_text()
    (folder / "model.onnx").write_bytes(b"onnx")
    check = {
        "data": "data/val",
        "weights": metrics["weights"],
        "onnx": hashlib.sha256(b"onnx").hexdigest(),
        "images": 2,
        "takes": "images padded to 96 × 96 pixels",
        "threads": 1,
        "differences": {"one_by_one": {"box_pixels": 0.25, "score": 2e-6}},
        "milliseconds": {"pytorch": 2.0, "onnxruntime": 1.0},
    }
    for wrong in (None, check | {"weights": "other"}, check | {"onnx": "other"}):
        (folder / "onnx_check.json").write_text(json.dumps(wrong and {"model.onnx": wrong}))
        with pytest.raises(PublishError, match="model.onnx was not exported from these weights"):
            write_card(folder, metrics, CardArguments())
    (folder / "onnx_check.json").write_text(json.dumps({"model.onnx": check, "gone.onnx": check}))
    write_card(folder, metrics, CardArguments())
    text = (folder / "README.md").read_text()
    assert json.loads((folder / "onnx_check.json").read_text()) == {"model.onnx": check}
    assert "batches of any number of images padded to 96 × 96 pixels:" in text
    assert "at most 0.25 pixels" in text and "onnxruntime.InferenceSession" in text and "`model.onnx`" not in text
    int8 = check | {"precision": "int8", "AP": 0.25, "AP_float32": 0.5, "AP_images": 2, "megabytes": 0.5}
    (folder / "model_int8.onnx").write_bytes(b"onnx")
    checks = {"model.onnx": check | {"precision": "fp32"}, "model_int8.onnx": int8}
    (folder / "onnx_check.json").write_text(json.dumps(checks))
    lines = write_card(folder, metrics, CardArguments()).read_text().splitlines()
    (told,) = [line for line in lines if line.startswith("`model_int8.onnx` (int8): On 2 images")]
    assert told.endswith("AP 25.0, in float32 50.0 (images: 2); 0.5 MB.")
    assert len([line for line in lines if line.startswith("`model.onnx` (fp32): On 2 images")]) == 1
    (folder / "model_fp16.onnx").write_bytes(b"other")
    with pytest.raises(PublishError, match="model_fp16.onnx was not exported from these weights"):
        write_card(folder, metrics, CardArguments())


@pytest.mark.parametrize("index", [0, 1])
def test_code_in_the_card_runs(prepared, tmp_path, monkeypatch, capsys, index):
    """Both snippets, as they stand, from the model's folder."""
    folder = shutil.copytree(prepared, tmp_path / "model")
    Image.new("RGB", (90, 70), "orange").save(folder / "photograph.jpg")
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[index]
    threshold = json.loads((prepared / METRICS).read_text())["student"]["thresholds"]["all"]["threshold"]
    assert f"threshold={threshold}" in code
    (folder / "snippet.py").write_text(code.replace(f"threshold={threshold}", "threshold=0.0"))
    monkeypatch.chdir(folder)
    runpy.run_path("snippet.py")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and any("circle" in line for line in lines)


def test_training_yaml_builds_the_run_again(prepared):
    """The published YAML is a configuration of the scripts, and holds no path of this machine."""
    text = (prepared / "training.yaml").read_text()
    types = (ModelArguments, TeacherArguments, DataArguments, D3etrTrainingArguments)
    model, teacher, data, training = parse_arguments(types, [str(prepared / "training.yaml"), "--use_cpu", "true"])
    assert (data.data_folder, teacher.teacher, training.output_dir) == ("data", "teacher", "distilled")
    assert training.max_steps == 4 and training.learning_rate == 1e-3
    assert read_yaml(text)["model_config"] == model.model_config
    assert "/" not in re.sub(r"scripts/\w+.py", "", text)


def test_what_was_not_measured_is_left_out(prepared, metrics, tmp_path):
    """No empty rows, no placeholder: neither for a teacher, nor for energy, time or sizes."""
    folder = shutil.copytree(prepared, tmp_path / "model")
    for name in ("detections.png", "attention.png", "curves.png", "README.md"):
        (folder / name).unlink()
    bare = copy.deepcopy(metrics)
    del bare["teacher"], bare["compared"], bare["training"]["seconds"], bare["training"]["environment"]
    for name in ("AP_small", "AP_medium", "AP_large"):
        bare["student"]["metrics"].pop(name, None)
    write_card(folder, bare, CardArguments())
    text = (folder / "README.md").read_text()
    for absent in (
        "teacher |",
        "| S |",
        "kWh",
        "time of the training",
        "| device |",
        "png",
        "None",
        "nan",
        "license",
        "{{",
    ):
        assert absent not in text, absent
    full = (prepared / "README.md").read_text()
    for present in (
        "teacher |",
        "student alone |",
        "time of the training",
        "| device |",
        "detections.png",
        "curves.png",
    ):
        assert present in full, present


def test_instability_is_told_where_it_was_logged(distilled, prepared):
    """From the log history to the picture and the sentence: means of the layers, first and last, with their steps."""
    assert "instability" not in (prepared / "README.md").read_text()
    history = json.loads((distilled / "log_history.json").read_text())
    for entry, step, (one, other) in zip(history, (100, 1200), ((0.5, 0.9), (0.2, 0.3)), strict=False):
        entry |= {"instability/adaptive/layer_0": one, "instability/adaptive/layer_1": other, "step": step}
    (distilled / "log_history.json").write_text(json.dumps(history))
    card = write_model_card(distilled).read_text()
    assert (
        "visit before (mean of the decoder layers): of the teacher's in adaptive matching 70% at step 100 and 25% at "
        "step 1,200." in card
    )
    assert "](instability.png)" in card and (distilled / "instability.png").exists()


def test_energy(metrics, tmp_path, prepared):
    """What codecarbon wrote reaches the text and the metadata."""
    folder = shutil.copytree(prepared, tmp_path / "model")
    metrics["training"]["energy"] = {"kilowatt_hours": 1.25, "kilograms_of_co2": 0.5}
    write_card(folder, metrics, CardArguments())
    card = ModelCard.load(folder / "README.md")
    assert card.data["co2_eq_emissions"] == {
        "emissions": 500.0,
        "source": "codecarbon",
        "training_type": "pre-training",
    }
    assert "1.25 kWh, 0.5 kg CO₂" in card.text and "codecarbon" in card.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compare": ["runs/alone"]}, "title=folder"),
        ({"compare": ["=x"]}, "title=folder"),
        ({"compare": ["a=x", "a=y"]}, "given twice"),
        ({"compare": ["Teacher=x"]}, "teacher's or student's own"),
        ({"compare": ["/mnt/nas/alone=x"]}, "holds a path or a secret"),
        ({"teacher_id": "teacher"}, "owner/name"),
        ({"dataset_id": "/data/coco"}, "owner/name"),
    ],
)
def test_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        CardArguments(**fields)


@pytest.mark.parametrize(("classes", "folded"), [(1, False), (12, False), (13, True)])
def test_thresholds_in_the_card(prepared, metrics, tmp_path, classes, folded):
    """A line a class and one for all, folded where they are many; the code takes that of all."""
    folder = shutil.copytree(prepared, tmp_path / "model")
    names = [f"class {index}" for index in range(classes)]
    for split in metrics["data"].values():
        split["classes"] = dict.fromkeys(names, 3)
    best = {"threshold": 0.35, "F1": 0.5, "precision": 0.25, "recall": 0.75}
    metrics["student"]["thresholds"] = {"classes": dict.fromkeys(names, best), "all": best | {"threshold": 0.29}}
    text = write_card(folder, metrics, CardArguments()).read_text()
    assert text.count(" | 0.35 | 50.0 | 25.0 | 75.0 |") == classes and text.count("threshold=0.29") == 2
    assert ("| **all classes** | 0.29 | 50.0 | 25.0 | 75.0 |" in text) == (classes > 1)
    assert ("<details><summary>Thresholds of each class</summary>\n\n| class |" in text) == folded
    del metrics["student"]["thresholds"]  # of an earlier version
    text = write_card(folder, metrics, CardArguments()).read_text()
    assert "threshold of the highest" not in text and text.count("threshold=0.4") == 2


def test_class_names_do_not_break_tables(prepared, metrics, tmp_path):
    """A bar or a line break in a class name stays inside its cell."""
    folder = shutil.copytree(prepared, tmp_path / "model")
    strange = "a|b\nc"
    for split in metrics["data"].values():
        split["classes"] = {strange: 3, **split["classes"]}
    write_card(folder, metrics, CardArguments())
    row = next(line for line in (folder / "README.md").read_text().splitlines() if "a\\|b c" in line and "|" in line)
    header = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| class |"))
    assert row.replace("\\|", "").count("|") == header.count("|")
