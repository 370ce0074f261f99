"""What a run's folder says of its training."""

from types import SimpleNamespace

import pytest

from d3etr_hf.data import DataArguments
from d3etr_hf.errors import PublishError
from d3etr_hf.publishing import run_folder
from d3etr_hf.publishing.run_folder import describe_training, load_run, merged_data_arguments
from d3etr_hf.runs.output_folder import RESULTS


def test_options_under_a_teacher_of_predictions(tmp_path):
    """What such a teacher cannot teach was off, whatever the configuration says; its schedule is told all the same."""
    records = {RESULTS: {"steps": 3}}
    run = SimpleNamespace(teacher=SimpleNamespace(predictions_only=True), folder=tmp_path, record=records.get)
    options = describe_training(run, {"distillation_interval": 2, "prediction_weight": 0.5})["options"]
    assert options["distillation_interval"] == 2 and options["prediction_weight"] == 0.5
    assert options["self_attention_weight"] == options["cross_attention_weight"] == 0
    assert options["auxiliary_queries"] == "none"


def test_data_named_anew_replace_the_old_splits():
    old = {"data_folder": "old", "validation_fraction": 0.1, "short_side": 64, "long_side": 80}
    paths = {"train_annotations": "t.json", "train_images": "t", "val_annotations": "v.json", "val_images": "v"}
    merged = merged_data_arguments(old, DataArguments(**paths))
    assert merged == DataArguments(**paths, short_side=64, long_side=80)
    old = {"dataset_name": "a/b", "dataset_train_split": "train[:80%]", "dataset_val_split": "train[80%:]"}
    held_out = DataArguments(data_folder="new", validation_fraction=0.2)
    assert merged_data_arguments(old, held_out) == held_out
    assert merged_data_arguments(old, DataArguments()) == DataArguments(**old)
    with pytest.raises(PublishError, match=r"options given here \(validation_fraction 0.2\) .*not both"):
        merged_data_arguments(old, DataArguments(validation_fraction=0.2))


@pytest.mark.parametrize(("options", "looked_at"), [("", False), ("unlabeled_images: photos\n", True)])
def test_images_without_labels_are_loaded_to_be_counted(tmp_path, monkeypatch, options, looked_at):
    """Which `load_splits` does only for a training."""
    (tmp_path / "run.yaml").write_text(f"data_folder: data\n{options}")
    (tmp_path / RESULTS).write_text("{}")
    asked = []
    student = SimpleNamespace(config=SimpleNamespace(model_type="detr"))
    monkeypatch.setattr(run_folder, "load_detector", lambda *_: student)
    monkeypatch.setattr(run_folder, "image_processor_of", lambda *_: None)
    monkeypatch.setattr(run_folder, "load_splits", lambda *_, trains: asked.append(trains) or (None, None))
    load_run(tmp_path)
    assert asked == [looked_at]
