"""`d3etr benchmark`: what saved detectors cost at inference."""

import sys
from pathlib import Path

import pytest
import yaml
from transformers import RTDetrConfig, RTDetrForObjectDetection

from d3etr_hf.cli import benchmark
from d3etr_hf.errors import CommandLineError, DetectorLoadError, ImageSizeError
from d3etr_hf.models import image_processors
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.publishing import inference_cost
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def saved(tmp_path):
    """Two detectors, the second with two decoder layers more and images twice as large."""
    paths = {}
    for name, layers, side in (("small", 2, 64), ("large", 4, 128)):
        tiny_model(decoder_layers=layers).save_pretrained(tmp_path / name)
        load_image_processor(None, side, side).save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    return paths


def test_table_of_two_detectors(saved, monkeypatch, capsys):
    """The detectors come first, without a flag; each is measured at its own image processor's size."""
    monkeypatch.setattr(inference_cost, "MOST_ROUNDS", 5)
    sizes = []
    monkeypatch.setattr(inference_cost, "seconds_of", lambda call: sizes.append(len(call().pred_boxes)) or 1.0)
    call = ["d3etr benchmark", *saved.values(), "--height", "50", "--width", "50", "--batch_size", "3"]
    monkeypatch.setattr(sys, "argv", call)
    benchmark.main()
    assert sizes == [3, 3]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines}
    small, large = rows[saved["small"]], rows[saved["large"]]
    assert (small[1], large[1]) == ("64x64", "128x128")
    assert int(small[2].replace(",", "")) < int(large[2].replace(",", ""))
    assert 0 < float(small[3]) < float(large[3]) and float(small[4]) > 0
    assert [line[0] for line in lines] == ["model", small[0], *PARTS, large[0], *PARTS]


def test_an_image_too_narrow_to_resize_is_refused(saved):
    with pytest.raises(ImageSizeError, match="small: an image of 5000×1 pixels cannot be resized .*: choose another"):
        benchmark.measure_costs([saved["small"]], height=1, width=5000, use_cpu=True)


PARTS = ["backbone", "encoder", "decoder", "heads", "queries"]


@pytest.mark.parametrize("option", ["height", "batch_size"])
def test_size_without_pixels_is_refused(option, saved, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["d3etr benchmark", saved["small"], f"--{option}", "0"])
    with pytest.raises(CommandLineError, match=f"{option} is 0: it must be at least 1"):
        benchmark.main()


def test_a_configuration_costs_what_its_model_does(monkeypatch):
    """A file that comes with the package, at the size of its family's own image processor; none is looked for."""
    monkeypatch.setattr(inference_cost, "MOST_ROUNDS", 2)
    monkeypatch.setattr(image_processors, "load_image_processor", lambda path: pytest.fail(path))
    path = "configs/shapes/rt_detr_student_model.yaml"
    (cost,) = benchmark.measure_costs([path], 50, 50, use_cpu=True).values()
    options = yaml.safe_load((REPOSITORY / path).read_text())
    stock = RTDetrForObjectDetection(RTDetrConfig(**options, num_labels=benchmark.CLASSES))
    assert cost["parameters"] == sum(parameter.numel() for parameter in stock.parameters())
    assert (cost["height"], cost["width"]) == (640, 640)
    with pytest.raises(DetectorLoadError, match="missing.yaml"):
        benchmark.measure_costs(["missing.yaml"])


def test_a_checkpoint_may_be_called_like_a_configuration(tmp_path):
    """By its name, even one that no file can have; a folder is none, nor what checkpoints call their configuration."""
    (folder := tmp_path / "student.yaml").mkdir()
    names = ["model.yaml", "model.yml", "models/student.json", f"{'x' * 300}.yaml"]
    others = ["runs/student/config.json", str(folder), "user/student"]
    assert [benchmark.is_configuration(name) for name in names + others] == [True] * 4 + [False] * 3


def test_height_and_width_keep_their_places_and_operations_are_of_one_image(saved, monkeypatch):
    """Of an image twice as wide as it is high; a batch is timed alone."""
    monkeypatch.setattr(inference_cost, "seconds_of", lambda call: 1.0)
    one, several = (
        benchmark.measure_costs([saved["small"]], 30, 60, size, use_cpu=True)[saved["small"]] for size in (1, 3)
    )
    assert (one["height"], one["width"]) == (32, 64)
    del one["milliseconds"], several["milliseconds"]
    assert one == several
