"""A torchvision of another build than torch's keeps nobody from anything."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FAULT = "operator torchvision::nms does not exist"
PROGRAM = """
from d3etr_hf import D3etrConditionalDetrForObjectDetection, D3etrTrainer, D3etrTrainingArguments
from transformers import ConditionalDetrImageProcessor, RTDetrForObjectDetection
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
ConditionalDetrImageProcessor()
"""


@pytest.mark.parametrize("before", ["", "import transformers"], ids=["first", "after Transformers"])
def test_a_broken_torchvision_is_told_in_one_line_and_left_out(tmp_path, before):
    """Its own RuntimeError came out of the first import of a detector."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({FAULT!r})")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + PROGRAM], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if FAULT in line]
    assert "left out: install the torchvision of torch's version and build" in line


def test_every_room_that_imports_transformers_looks_first():
    """Transformers decides once, when it is imported; a command looks before it imports a room."""
    rooms = set()
    for path in (REPOSITORY / "d3etr_hf").glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if (module or "").split(".")[0] == "transformers":
                rooms.add(path.parent)
    assert len(rooms) > 5
    for room in rooms - {REPOSITORY / "d3etr_hf" / "cli"}:
        imports = [
            node
            for node in ast.parse((room / "__init__.py").read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom) and node.module != "typing"
        ]
        assert [alias.name for alias in imports[0].names] == ["optional_torchvision"], room
