"""The README's Python example runs as it stands, and its comparison is one."""

import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.configurations import read_yaml
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.runs.comparison import Comparison
from d3etr_hf.runs.planned_run import plan
from tests.cli.test_training_run import SIDE, arguments
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_example(tmp_path, monkeypatch):
    """On a small data set, a tiny teacher and two steps; at most 20 lines of code."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    make_shapes(tmp_path / "data" / "shapes", 8, 4, progress=False)
    torch.manual_seed(0)
    tiny_model().save_pretrained(tmp_path / "runs" / "demo" / "teacher")
    load_image_processor(None, 96, 96).save_pretrained(tmp_path / "runs" / "demo" / "teacher")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    short = example.replace("max_steps=1000", "max_steps=2").replace("per_device_train_batch_size=16", "use_cpu=True")
    assert short != example
    exec(compile(short, "README.md", "exec"), {})
    from transformers import AutoModelForObjectDetection

    assert len(AutoModelForObjectDetection.from_pretrained("runs/student").config.id2label) == 3


def test_card_from_python(tmp_path, monkeypatch, capsys):
    """Of two short runs in the places that it names."""
    (example,) = [each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "write_model_card" in each]
    make_shapes(tmp_path / "data", 8, 4, image_size=SIDE, progress=False)
    for name in ("distilled", "student_alone"):
        train_detector(*arguments(tmp_path / "data", tmp_path / "runs" / "bccd" / name, max_steps=1))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "runs/bccd/distilled/README.md"
    card = ModelCard.load("runs/bccd/distilled/README.md")
    assert card.data.license == "apache-2.0" and "student alone |" in card.text


def test_comparison():
    """Two seeds of four modes of two students, two pairs beside, and one teacher; the other is a checkpoint."""
    example = read_yaml(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    assert len(plan(Comparison(**example))) == 2 * (4 * 2 + 2) + 1
