"""`d3etr data check`: one look at everything, and an exit code for scripts."""

import json
import sys

import pytest
from PIL import Image

from d3etr_hf.cli import data
from d3etr_hf.cli.main import run_command
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import load_image_processor
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    return make_shapes(tmp_path / "shapes", 12, 5, progress=False)


def called(monkeypatch, *arguments):
    """The exit code of a call; 0 where it just returns."""
    monkeypatch.setattr(sys, "argv", ["d3etr", *map(str, arguments)])
    try:
        run_command("data")
    except SystemExit as ended:
        return ended.code
    return 0


def test_sound_data(folder, monkeypatch, capsys, tmp_path):
    """Guards the table, the picture and that nothing is suspected without reason."""
    assert called(monkeypatch, "check", folder, "--output_dir", tmp_path / "out", "--pictured", "3") == 0
    printed = capsys.readouterr().out
    content = json.loads((folder / "annotations" / "train.json").read_text())
    of_first = sum(region["category_id"] == content["categories"][0]["id"] for region in content["annotations"])
    (line,) = [line for line in printed.splitlines() if line.split()[:1] == [content["categories"][0]["name"]]]
    assert line.split()[1] == str(of_first)
    assert "shapes/train" in printed and "96×96" in printed and "nothing is suspicious" in printed
    with Image.open(tmp_path / "out" / "annotations.png") as picture:
        assert picture.width > 2 * picture.height * 0.9  # four beside each other, in two rows


def test_everything_is_told_at_once(folder, monkeypatch, capsys, tmp_path):
    """Guards against one fault a call: a broken image, one in both splits, boxes of another unit, few queries."""
    tiny_model(num_queries=1).save_pretrained(tmp_path / "model")
    load_image_processor(None, 48, 64).save_pretrained(tmp_path / "model")
    names = {split: sorted((folder / split).iterdir()) for split in ("train", "val")}
    names["train"][0].write_text("no image")
    names["val"][0].write_bytes(names["train"][1].read_bytes())
    path = folder / "annotations" / "val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [0.1, 0.2, 0.3, 0.4]
    path.write_text(json.dumps(content))
    arguments = ["check", folder, "--pictured", "0", "--model", tmp_path / "model"]
    assert called(monkeypatch, *arguments) == 1
    printed = capsys.readouterr().out
    for part in (
        "resized to short_side 48, long_side 64",
        "look like fractions",
        "1 of 5 images of shapes/val are in shapes/train as well",
        "the model's 1 queries",
        "refused: shapes/train: 1 of 12 images are unreadable",
    ):
        assert part in printed


def test_images_without_labels_are_looked_at(folder, monkeypatch, capsys):
    """What training would leave out, warn of and refuse of them."""
    arguments = ["check", folder, "--pictured", "0", "--unlabeled_images", folder, "--max_train_images", "2"]
    assert called(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "shapes, unlabelled: 15 images" in printed
    assert "2 of 17 images are in shapes/train" in printed and "5 of 5 images of shapes/val are in shapes, " in printed
    next((folder / "val").iterdir()).write_text("no image")
    assert called(monkeypatch, *arguments) == 1
    assert "shapes, unlabelled: 1 of 15 images are unreadable" in capsys.readouterr().out


def test_an_image_of_a_sound_header_that_cannot_be_decoded(folder, monkeypatch, capsys, tmp_path):
    """Guards findings that are lost where drawing fails, and the picture of all the others."""
    first = min((folder / "train").iterdir())
    content = first.read_bytes()
    half = len(content) // 2
    first.write_bytes(content[:half] + bytes(40) + content[half + 40 :])
    min((folder / "val").iterdir()).write_bytes(sorted((folder / "train").iterdir())[1].read_bytes())
    assert called(monkeypatch, "check", folder, "--output_dir", tmp_path / "out", "--pictured", "12") == 1
    printed = capsys.readouterr().out
    assert "refused: 1 of the 17 images that were to be drawn cannot be decoded" in printed
    assert printed.count(f"train/{first.name}: ") == 1
    assert "1 of 5 images of shapes/val are in shapes/train as well" in printed
    assert (tmp_path / "out" / "annotations.png").stat().st_size > 0


def test_data_that_cannot_be_read_at_all(folder, monkeypatch, capsys):
    """Guards the exit code where there is no table."""
    (folder / "annotations" / "val.json").write_text("{}")
    assert called(monkeypatch, "check", folder) == 1
    assert "refused: " in capsys.readouterr().out


def test_what_there_is_besides_is_said(monkeypatch, capsys, folder):
    """Guards against a folder that is taken for an action, in silence."""
    assert called(monkeypatch, folder) == 2
    assert "d3etr data check FOLDER" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pictured is -1"):
        data.CheckArguments(pictured=-1)
