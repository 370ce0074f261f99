"""What a run's folder says of its training."""

from types import SimpleNamespace

from d3etr_hf.publishing.run_folder import describe_training


def test_options_under_a_teacher_of_predictions(tmp_path):
    """What such a teacher cannot teach was off, whatever the configuration says; its schedule is told all the same."""
    run = SimpleNamespace(
        teacher=SimpleNamespace(predictions_only=True), folder=tmp_path, record=lambda name: {"steps": 3}
    )
    options = describe_training(run, {"distillation_interval": 2, "prediction_weight": 0.5})["options"]
    assert options["distillation_interval"] == 2 and options["prediction_weight"] == 0.5
    assert options["self_attention_weight"] == options["cross_attention_weight"] == 0
    assert options["auxiliary_queries"] == "none"
