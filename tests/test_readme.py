"""The README's Python example runs as it stands, and its comparison is one."""

import re
from pathlib import Path

import torch

from d3etr_hf.configurations import read_yaml
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.runs.comparison import Comparison
from d3etr_hf.runs.planned_run import plan
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


def test_comparison():
    """Two seeds of four modes of two students, two pairs beside, and one teacher; the other is a checkpoint."""
    example = read_yaml(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    assert len(plan(Comparison(**example))) == 2 * (4 * 2 + 2) + 1
