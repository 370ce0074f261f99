"""`metrics.json`: each figure against another way to it."""

import json
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

from d3etr_hf.cli.evaluate import evaluate_detector
from d3etr_hf.configurations import read_yaml, write_yaml
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import PublishError
from d3etr_hf.models.families import FAMILIES
from d3etr_hf.publishing.card_texts import data_table
from d3etr_hf.publishing.inference_cost import count_cost, measure_milliseconds
from d3etr_hf.publishing.measurements import METRICS, is_measured, measure_run, select_rows
from d3etr_hf.publishing.run_folder import describe_data, links_to_hub, load_run, merged_data_arguments, read_energy
from tests.tiny import tiny_model


def test_teacher_and_control_are_evaluated_as_by_the_script(distilled, finished_runs, tmp_path):
    """The same AP as scripts/evaluate.py gives for each, on the same split."""
    run = load_run(distilled)
    metrics = measure_run(run, {"student alone": str(finished_runs / "alone")})
    data = DataArguments(data_folder=str(finished_runs / "data"))
    for row, model in ((metrics["teacher"], "teacher"), (metrics["compared"]["student alone"], "alone")):
        wanted = evaluate_detector(data, str(finished_runs / model), str(tmp_path), batch_size=4, use_cpu=True)
        assert row["metrics"] == pytest.approx(wanted)
    assert metrics["student"]["metrics"]["AP"] == json.loads((distilled / "results.json").read_text())["AP"]
    assert metrics["compared"]["student alone"]["steps"] == 4
    assert "steps" not in metrics["teacher"]  # a checkpoint without a run
    assert metrics["teacher"]["name"] == "teacher"  # its folder's last part only


def test_thresholds_are_the_students(distilled, finished_runs):
    """Of its own detections on the validation split, as the stock pipeline finds them."""
    best = measure_run(load_run(distilled, teacher="none"))["student"]["thresholds"]["all"]
    detect = pipeline("object-detection", model=str(distilled))
    paths = sorted((finished_runs / "data" / "val").iterdir())
    found = sum(len(each) for each in detect([str(path) for path in paths], threshold=best["threshold"], batch_size=1))
    objects = len(json.loads((finished_runs / "data" / "annotations" / "val.json").read_text())["annotations"])
    # precision times detections and recall times objects are both the number of those that are right
    assert found and found * best["precision"] == pytest.approx(objects * best["recall"], abs=1e-6)


def test_length_of_a_continued_training(finished_runs, distilled, tmp_path):
    """Steps and seconds of the run before are counted too; where they are unknown, none are told."""
    first = json.loads((finished_runs / "alone" / "results.json").read_text())
    for start, told in ((finished_runs / "alone", 8), (finished_runs / "teacher", None)):
        folder = shutil.copytree(finished_runs / "alone", tmp_path / f"after_{start.name}")
        configuration = read_yaml((folder / "run.yaml").read_text())
        (folder / "run.yaml").write_text(write_yaml(configuration | {"model": str(start)}))
        row = measure_run(load_run(distilled, teacher="none"), {start.name: str(folder)})["compared"][start.name]
        assert row.get("steps") == told
        assert row.get("seconds") == (None if told is None else pytest.approx(2 * first["seconds"]))


def test_measured_once(distilled, monkeypatch):
    """Called again it reads; other weights, or a new title, are measured."""
    run = load_run(distilled, teacher="none")
    first = measure_run(run)
    assert "teacher" not in first
    assert is_measured(distilled, {}) and not is_measured(distilled, {"other": "x"})
    tampered = json.loads((distilled / METRICS).read_text())
    tampered["student"]["metrics"]["AP"] = 0.123
    (distilled / METRICS).write_text(json.dumps(tampered))
    assert measure_run(run)["student"]["metrics"]["AP"] == 0.123
    assert measure_run(run, again=True)["student"]["metrics"]["AP"] == first["student"]["metrics"]["AP"]
    weights = load_file(distilled / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, distilled / "model.safetensors", {"format": "pt"})
    assert not is_measured(distilled, {})


def test_data(finished_runs, distilled):
    """Counts, against the annotation files."""
    run = load_run(distilled, teacher="none")
    described = describe_data(run.train, run.val)
    for split in ("train", "val"):
        coco = json.loads((finished_runs / "data" / "annotations" / f"{split}.json").read_text())
        names = {category["id"]: category["name"] for category in coco["categories"]}
        counts = Counter(names[annotation["category_id"]] for annotation in coco["annotations"])
        assert described[split]["classes"] == {name: counts[name] for name in names.values()}
        assert described[split]["images"] == len(coco["images"])
        assert described[split]["objects"] == len(coco["annotations"])
    small = [annotation for annotation in coco["annotations"] if annotation["area"] < 1024]
    assert described["val"]["sizes"]["small"] == len(small) and sum(described["val"]["sizes"].values()) == len(
        coco["annotations"]
    )


def test_images_without_labels_are_counted_apart(distilled):
    run = load_run(distilled, teacher="none")
    count = len(run.val)
    described = describe_data(run.train.with_unlabeled(run.val, 2.5), run.val)
    assert described["unlabeled"] == {"name": run.val.name, "images": count, "ratio": 2.5}
    assert described["train"] == describe_data(run.train, run.val)["train"]
    lines = data_table(described).splitlines()
    assert len(lines) == 1 + len(data_table(describe_data(run.train, run.val)).splitlines())
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["without labels, 2.5 for each image of training", run.val.name, str(count), "–"]


def test_training_facts(distilled):
    """Steps, batch and options of the run; versions and device as recorded when it ran."""
    training = measure_run(load_run(distilled, teacher="none"))["training"]
    assert (training["steps"], training["batch_size"], training["precision"]) == (4, 8, "float32")
    assert (
        training["options"]["auxiliary_queries"] == "teacher" and training["options"]["distillation_l1_weight"] == 5.0
    )
    assert training["environment"]["versions"]["torch"] == torch.__version__
    assert training["seconds"] > 0 and training["epochs"] == 2.0
    assert "energy" not in training


def test_energy_is_summed_over_interruptions(tmp_path):
    file = tmp_path / "emissions.csv"
    file.write_text("run_id,energy_consumed,emissions\na,0.5,0.1\nb,0.25,0.05\n")
    assert read_energy(file) == pytest.approx({"kilowatt_hours": 0.75, "kilograms_of_co2": 0.15})
    assert read_energy(tmp_path / "absent.csv") is None


def test_flops_against_a_count_by_hand():
    """The whole decoder, from its shapes: d = 32, 7 queries, 64 tokens of memory, FFN 48, 3 layers."""
    model = tiny_model()
    cost = count_cost(model, torch.randn(1, 3, 64, 64))
    d, queries, tokens, ffn, layers = 32, 7, 64, 48, 3
    self_attention = 6 * queries * d * d + 2 * queries * queries * d  # 5 inputs and the output projected; QK and AV
    # content key, value and position key of the memory; content, sine and output of the queries; keys twice as wide
    cross_attention = 3 * tokens * d * d + 3 * queries * d * d + queries * tokens * (2 * d + d)
    per_layer = self_attention + cross_attention + 2 * queries * d * ffn
    # only the first layer projects the position of the queries for cross-attention
    reference_points = queries * (d * d + d * 2)
    query_scale = (layers - 1) * 2 * queries * d * d
    by_hand = 2 * (layers * per_layer + queries * d * d + reference_points + query_scale)
    assert cost["parts"]["decoder"]["flops"] == by_hand
    assert cost["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for key in ("parameters", "flops"):
        assert sum(part[key] for part in cost["parts"].values()) == cost[key]
    convolutions = 2 * (16 * 16 * 8 * 3 * 16) + 2 * (8 * 8 * 16 * 8 * 4)  # patches of 4, then of 2
    assert cost["parts"]["backbone"]["flops"] > convolutions
    assert list(cost["parts"]) == ["backbone", "encoder", "decoder", "heads", "queries"]
    # three layers of three classes and of boxes
    heads = layers * queries * (d * 3 + d * d + d * d + d * 4)
    assert cost["parts"]["heads"]["flops"] in (2 * heads, 2 * heads // layers)
    assert cost["parts"]["queries"] == {"parameters": queries * d, "flops": 0}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_operations_of_every_family_are_those_of_its_parts(family):
    """Each part has at least its linear layers' and convolutions', counted by hooks; nothing is left over."""
    model = tiny_model(model_type=family)
    pixels = torch.randn(1, 3, 64, 64)
    expected: Counter[str | None] = Counter()
    stock = model.to_stock()

    def count(role, module, _, output):
        expected[role] += 2 * output.numel() * module.weight[0].numel()

    hooks = [
        module.register_forward_hook(partial(count, model.role_of(f"{name}.")))
        for name, module in stock.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    with torch.no_grad():
        stock(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    cost = count_cost(model, pixels)
    assert "other" not in cost["parts"] and None not in expected
    for role, operations in expected.items():
        assert cost["parts"][role]["flops"] >= operations > 0
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(part["flops"] for part in cost["parts"].values()) == cost["flops"]


def test_what_is_in_no_part_is_told():
    model = tiny_model()
    model.parts = {role: prefixes for role, prefixes in model.parts.items() if role != "heads"}
    cost = count_cost(model, torch.randn(1, 3, 64, 64))
    assert cost["parts"]["other"]["parameters"] == 32 * 3 + 3 + 2 * (32 * 32 + 32) + 32 * 4 + 4
    for key in ("parameters", "flops"):
        assert sum(part[key] for part in cost["parts"].values()) == cost[key]


def test_milliseconds():
    """A slower model is slower, whichever comes first; of a batch the milliseconds are of one image."""

    class Sleeper(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, pixel_values):
            import time

            time.sleep(self.seconds)

    pixels, batch = torch.zeros(1), torch.zeros(4)
    models = {"slow": (Sleeper(0.02), pixels), "fast": (Sleeper(0.005), pixels), "batch": (Sleeper(0.02), batch)}
    found = measure_milliseconds(models)
    assert 20 <= found["slow"]["median"] < 40 and 5 <= found["fast"]["median"] < 20
    assert 5 <= found["batch"]["median"] < 20


def test_options_of_an_earlier_version_are_named(distilled):
    """`class_weight` was D3ETR's, and could be taken for the detection loss's."""
    configuration = read_yaml((distilled / "run.yaml").read_text())
    (distilled / "run.yaml").write_text(write_yaml(configuration | {"class_weight": 2.0, "l1_weight": 1.0}))
    told = "class_weight is now distillation_class_weight, l1_weight is now distillation_l1_weight;"
    with pytest.raises(PublishError, match=f"run.yaml has options of an earlier version: {told}"):
        load_run(distilled)


@pytest.mark.parametrize("missing", ["run.yaml", "results.json"])
def test_unfinished_runs_are_refused(distilled, missing):
    (distilled / missing).unlink()
    with pytest.raises(PublishError, match=missing):
        load_run(distilled)


def test_missing_weights_are_named(distilled):
    run = load_run(distilled, teacher="none")
    (distilled / "model.safetensors").unlink()
    with pytest.raises(PublishError, match="model.safetensors"):
        measure_run(run)


def test_results_of_other_weights_are_refused(distilled):
    """results.json tells of which weights it is; swapped weights get no AP that is not theirs."""
    weights = load_file(distilled / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, distilled / "model.safetensors", {"format": "pt"})
    with pytest.raises(PublishError, match="measured with other weights"):
        measure_run(load_run(distilled, teacher="none"))


def test_results_without_weights_are_measured(distilled):
    """Of an older version: nobody knows which weights they are of."""
    results = json.loads((distilled / "results.json").read_text())
    del results["weights"]
    (distilled / "results.json").write_text(json.dumps(results | {"AP": 0.99}))
    found = measure_run(load_run(distilled, teacher="none"))["student"]["metrics"]
    assert found["AP"] == pytest.approx(results["AP"])


def test_compared_detectors_are_those_asked_for(distilled, finished_runs):
    """Another folder under the same title is measured anew; a title not given goes; a gone folder holds."""
    run = load_run(distilled, teacher="none")
    alone = shutil.copytree(finished_runs / "alone", distilled.parent / "alone")
    first = measure_run(run, {"other": str(alone)})["compared"]["other"]
    second = measure_run(run, {"other": str(finished_runs / "teacher")})["compared"]["other"]
    assert first["metrics"] != second["metrics"]
    measure_run(run, {"other": str(alone)})
    shutil.rmtree(alone)
    assert is_measured(distilled, {"other": str(alone)})
    assert "compared" not in select_rows(distilled, {})


def test_given_data_arguments_join_those_of_the_run():
    """A moved folder keeps the run's sizes and limits; another kind of place replaces the first."""
    configuration = {"data_folder": "old", "max_val_images": 3, "short_side": 64, "long_side": 64, "model": "x"}
    merged = merged_data_arguments(configuration, DataArguments(data_folder="new"))
    assert (merged.data_folder, merged.max_val_images, merged.short_side) == ("new", 3, 64)
    merged = merged_data_arguments(configuration, DataArguments(dataset_name="user/data"))
    assert (merged.data_folder, merged.dataset_name, merged.max_val_images) == (None, "user/data", 3)


def test_links_are_those_of_the_time(tmp_path, monkeypatch):
    """A local folder is never taken for a repository, even where its name looks like one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    found = links_to_hub(teacher="runs/teacher", dataset="user/data", started_from="/home/x/y")
    assert found == {"dataset": "user/data"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ("[1]", "not of `d3etr"),
        ('{"AP": 1}', "not of"),
        ('{"weights": "", "student": {}, "data": {}}', "of an earlier version: move it away"),
    ],
)
def test_foreign_metrics_are_named(distilled, content, message):
    (distilled / "metrics.json").write_text(content)
    with pytest.raises(PublishError, match=f"metrics.json is {message}"):
        is_measured(distilled, {})
