"""`d3etr predict` writes pictures and one JSON file, also of what came before an image that is broken."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import d3etr_hf
from d3etr_hf.cli import main as command_line
from d3etr_hf.cli.predict import picture_names, with_names
from d3etr_hf.errors import CommandLineError
from tests.tiny import small_image_processor, tiny_model


@pytest.fixture
def detector(tmp_path) -> str:
    tiny_model(3).save_pretrained(tmp_path / "detector")
    small_image_processor().save_pretrained(tmp_path / "detector")
    return str(tmp_path / "detector")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "more/a.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def call(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["d3etr", "predict", *map(str, argv)])
    command_line.main()


def refusal(monkeypatch, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_pictures_and_json(detector, photos, tmp_path, monkeypatch, capsys):
    out, named = tmp_path / "out", [photos, photos / "more"]
    everything = d3etr_hf.predict(detector, named, 0.0)
    threshold = sorted(row["score"] for each in everything for row in each["detections"])[-4]
    call(monkeypatch, detector, *named, "--out", out, "--threshold", threshold)
    records = json.loads((out / "predictions.json").read_text())
    assert [record.pop("picture") for record in records] == ["a.png", "b.png", "a_2.png"]
    assert records == d3etr_hf.predict(detector, named, threshold)
    assert f"predictions.json: 3 detections on 3 images, scores above {threshold:g}" in capsys.readouterr().out
    call(monkeypatch, detector, photos / "a.png", "--out", out, "--threshold", everything[0]["detections"][1]["score"])
    drawn, plain = (np.asarray(Image.open(place / "a.png").convert("RGB").resize((90, 60))) for place in (out, photos))
    assert Image.open(out / "a.png").size == (600, 400)
    # noise, enlarged and shrunk again, is itself where nothing is drawn
    assert 0.01 < (np.abs(drawn.astype(int) - plain) > 100).any(axis=2).mean() < 0.9


def test_nothing_that_was_found_is_lost(detector, photos, tmp_path, monkeypatch, capsys):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:3000])
    options = ["--out", tmp_path / "out", "--batch_size", 8]
    message = refusal(monkeypatch, capsys, detector, photos, *options)
    assert message.startswith(f"d3etr predict: error: {photos / 'b.png'}: the image cannot be read")
    assert [record["picture"] for record in json.loads((tmp_path / "out" / "predictions.json").read_text())] == [
        "a.png"
    ]
    call(monkeypatch, detector, photos, *options, "--skip_broken_images", "true", "--pictures", "false")
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["file"] == str(photos / "a.png") and "picture" not in record


def test_refusals(detector, photos, monkeypatch, capsys):
    for argv, message in [
        ([detector], "which images?"),
        ([detector, photos, "--out", photos], "holds the images themselves"),
        ([detector, photos, "--threshold", 2], "threshold is 2.0: it must be in 0..1"),
        ([detector, photos, "--batch_size", 0], "batch_size is 0"),
        ([detector, photos / "none"], "there is no such file or folder"),
        ([photos / "none", photos], "there is no such folder, and it is no Hub id"),
        ([detector, photos, "--thresold", 0.3], "did you mean '--threshold'?"),
    ]:
        assert message in refusal(monkeypatch, capsys, *argv)


def test_names_of_arguments_and_pictures():
    assert with_names(["m", "a", "b", "--out", "x"]) == ["--model", "m", "--images", "a", "b", "--out", "x"]
    assert with_names(["--model", "m"]) == ["--model", "m"]
    assert with_names(["m", "--images", "a"]) == ["--model", "m", "--images", "a"]
    with pytest.raises(CommandLineError, match="which images"):
        with_names(["m"])
    assert with_names(["m", "--images=a"]) == ["--model", "m", "--images=a"]
    with pytest.raises(CommandLineError, match=r"images are \['a'\] and --images"):
        with_names(["m", "a", "--images", "b"])
    files = [Path(name) for name in ("x/1.jpg", "y/1.png", "y/1_2.jpg", "z/1.jpg", "X.jpg", "x.png")]
    assert picture_names(files) == ["1.png", "1_2.png", "1_2_2.png", "1_3.png", "X.png", "x_2.png"]
