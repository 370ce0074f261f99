"""`import d3etr_hf` is light: what only pictures, cards, exports and commands need stays out of it."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NOT_NEEDED = ("matplotlib", "jinja2", "evaluate", "onnx", "onnxruntime", "resource")
OURS = "from d3etr_hf import D3etrConditionalDetrForObjectDetection, D3etrTrainer, D3etrTrainingArguments"
STOCK = "from transformers import ConditionalDetrForObjectDetection, Trainer, TrainingArguments"


def run(program: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_the_three_names_need_no_extras():
    """Guards a core import that drags in what draws, exports or only exists on Unix."""
    # psutil, which accelerate needs, takes `resource` where there is one; None: ImportError, as if not installed
    block = f"import psutil, sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
    result = run(f"{block}{OURS}\nassert D3etrTrainer.__mro__[-1] is object")
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing_heavy():
    result = run("import sys, d3etr_hf\nprint({'torch', 'transformers'} & set(sys.modules), dir(d3etr_hf))")
    assert result.stdout.startswith("set()"), result.stdout + result.stderr
    assert "D3etrTrainer" in result.stdout


def test_the_three_names_come_about_as_fast_as_their_parents():
    """1.07 times as long in processor seconds; the bound leaves room for a busy machine."""

    def seconds(program: str) -> float:
        return float(run(f"{program}\nimport time\nprint(time.process_time())").stdout)

    # by turns, so that other work on the machine hits both alike
    rounds = [(seconds(STOCK), seconds(OURS)) for _ in range(2)]
    stock, ours = (min(times) for times in zip(*rounds, strict=True))
    assert ours < 1.5 * stock
