"""`d3etr analyze`: tables, a file, and a verdict that follows from the figures."""

import json
import sys

import pytest

from d3etr_hf.cli import analyze
from d3etr_hf.data import DataArguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CommandLineError, DatasetError, EvaluationError
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector
from d3etr_hf.publishing import inference_cost
from tests.shapes_fixture import keep_objects
from tests.tiny import tiny_model


def test_with_and_without_data(tmp_path, monkeypatch, capsys):
    """The model is loaded once, and where it was measured its layers are analysed."""
    loaded = []

    def load(path):
        loaded.append(path)
        return load_detector(path)

    monkeypatch.setattr(analyze, "detector_of", load)
    monkeypatch.setattr(inference_cost, "MOST_ROUNDS", 5)
    tiny_model().save_pretrained(tmp_path / "model")
    load_image_processor(None, 64, 64).save_pretrained(tmp_path / "model")
    make_shapes(tmp_path / "data", 1, 3, image_size=64, progress=False)
    call = ["d3etr analyze", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    for further, layers in (([], 0), (["--data_folder", str(tmp_path / "data")], 3)):
        monkeypatch.setattr(sys, "argv", [*call, *further])
        loaded.clear()
        analyze.main()
        assert loaded == [str(tmp_path / "model")]
        content = json.loads((tmp_path / "out" / "analysis.json").read_text())
        assert len(content["layers"]) == layers and content["cost"]["parameters"] > 0
        said = capsys.readouterr().out
        assert all(sentence in said for sentence in content["verdict"]) and ("query sinks" in said) == bool(layers)


def test_faults_of_the_data_are_told_first(tmp_path, monkeypatch):
    """Training images are not looked at; a place that is not there is told before anything is measured."""
    tiny_model().save_pretrained(tmp_path / "model")
    load_image_processor(None, 64, 64).save_pretrained(tmp_path / "model")
    folder = make_shapes(tmp_path / "data", 1, 2, image_size=64, progress=False)
    for image in (folder / "train").iterdir():
        image.write_text("no image")
    keep_objects(folder, "val", [0, 1])
    data = DataArguments(data_folder=str(folder), max_val_images=1)
    with pytest.raises(EvaluationError, match="shapes/val|data/val.*none of its 1 images has an object"):
        analyze.analyze_layers(tiny_model(), str(tmp_path / "model"), data)
    monkeypatch.setattr(analyze, "detector_of", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(sys, "argv", ["d3etr analyze", str(tmp_path / "model"), "--data_folder", "missing"])
    with pytest.raises(DatasetError, match="data_folder"):
        analyze.main()
    sys.argv[1] = "configs/demo/student_model.yaml"
    with pytest.raises(CommandLineError, match="student_model.yaml' is a configuration.*leave the data out"):
        analyze.main()


def layer(ap, sink_mass=0.0, on_objects=0.5):
    attention = {"self_sinks": 1.0, "self_sink_mass": sink_mass, "cross_sinks": 0.0, "cross_sink_mass": 0.0}
    return {"AP": ap, "AP50": ap, **attention, "cross_on_objects": on_objects, "object_area": 0.25}


@pytest.mark.parametrize(
    ("decoder", "layers", "expected", "absent"),
    [
        (0.1, [], "for speed it needs a smaller backbone", "Layer"),
        (0.6, [], "saves about 30%.", "smaller backbone"),
        (0.6, [layer(0.2), layer(0.296), layer(0.3)], "Layer 1 alone has AP 29.6", "sinks"),
        (0.6, [layer(0.1), layer(0.2), layer(0.3)], "Each layer adds something up to the last", "can keep nearly"),
        (
            0.6,
            [layer(0.3), layer(0.3, 0.4)],
            "In layer 1 40% of self-attention goes to 1.0",
            "little of where",
        ),
        (0.6, [layer(0.3, on_objects=0.3)], "it says little of where objects are", "something to copy"),
    ],
)
def test_verdict(decoder, layers, expected, absent):
    parts = {"backbone": 0.9 - decoder, "encoder": 0.1, "decoder": decoder}
    cost = {"flops": 1000, "parts": {name: {"flops": 1000 * share} for name, share in parts.items()}}
    said = " ".join(analyze.verdict(cost, layers))
    assert expected in said and absent not in said
    assert ("d3etr compare configs/evidence/decoder_layers.yaml" in said) == bool(layers)


def test_figures_of_a_verdict():
    """The second of three layers is as good as the last, which looks at objects three times as much as evenly."""
    parts = {"backbone": {"flops": 300}, "encoder": {"flops": 200}, "decoder": {"flops": 500}}
    layers = [layer(0.1, on_objects=0.25), layer(0.298), layer(0.3, on_objects=0.75)]
    said = " ".join(analyze.verdict({"flops": 1000, "parts": parts}, layers))
    for figure in (
        "Decoder: 50% of the operations; backbone and encoder: 50%.",
        "Layer 1 alone has AP 29.8 of the last layer's 30.0: a student with 2 of 3 decoder layers",
        "Cross-attention lies on objects 3.0 times as much",
    ):
        assert figure in said
    said = " ".join(analyze.verdict({"flops": 1000, "parts": parts}, [layer(0.1), layer(0.2), layer(0.3)]))
    assert "(AP 10.0 after the first, 30.0 after the last)" in said


def test_a_line_of_the_table_by_hand():
    of_self, of_cross = {"self_sinks": 1.5, "self_sink_mass": 0.1}, {"cross_sinks": 2.5, "cross_sink_mass": 0.2}
    row = {"AP": 0.123, "AP50": 0.456, **of_self, **of_cross, "cross_on_objects": 0.4, "object_area": 0.25}
    header, line, _ = analyze.format_layers([row]).splitlines()
    assert line.split() == ["0", "12.3", "45.6", "1.5", "10%", "2.5", "20%", "40%", "25%"]
    assert header.split() == "layer AP AP50 query sinks mass cell sinks mass on objects even".split()


def test_what_is_asked_for_is_measured(tmp_path, monkeypatch):
    asked = []

    def costs_of(detectors, height, width, batch_size=1, use_cpu=False):
        asked.append((detectors, height, width, batch_size, use_cpu))
        return {"model": {"flops": 1, "parts": {}}}

    def analyze_layers(detector, source, data, batch_size=8):
        asked.append((detector, source, data.data_folder, batch_size))
        return [layer(0.3)]

    monkeypatch.setattr(analyze, "check_places", lambda data: None)
    monkeypatch.setattr(analyze, "detector_of", lambda path: f"what {path} holds")
    monkeypatch.setattr(analyze, "format_costs", lambda cost: "")
    monkeypatch.setattr(analyze, "costs_of", costs_of)
    monkeypatch.setattr(analyze, "analyze_layers", analyze_layers)
    sizes = ["--height", "30", "--width", "60", "--batch_size", "3", "--use_cpu", "true"]
    call = ["d3etr analyze", "model", "--data_folder", "data", "--output_dir", str(tmp_path), *sizes]
    monkeypatch.setattr(sys, "argv", call)
    analyze.main()
    assert asked == [
        ({"model": "what model holds"}, 30, 60, 1, True),
        ("what model holds", "model", "data", 3),
    ]
