"""What the README says can be done is done: its commands run, or are parsed by their own parser; its snippets run."""

import json
import re
import runpy
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from transformers import AutoModelForObjectDetection

from d3etr_hf.cli import command_line
from d3etr_hf.cli.main import COMMANDS
from d3etr_hf.configurations import read_yaml, shipped
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.runs.comparison import Comparison
from d3etr_hf.runs.planned_run import plan
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
# where a command says one of these it is parsed alone: hours, data that do not come with the package, a network
ONLY_PARSED = ("configs/coco", "configs/families/shapes.yaml", "--license", "make-shapes", ".pth")
SHORT = (
    "--max_steps 2 --warmup_steps 1 --save_steps 2 --per_device_train_batch_size 2 --report_to none --use_cpu true "
    "--disable_tqdm true --probe false"
)
# public checkpoints that it names, as small ones of the same family and of COCO's classes
CHECKPOINTS = re.findall(r"--(?:model|teacher) ([\w-]+/[\w.-]+-[\w.-]+)", README)


def commands() -> list[str]:
    """Every line of its shell blocks, without comments; what goes on in a next line is one."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


class Understood(Exception):
    """A command line was parsed."""


def understand(words: list[str], monkeypatch) -> None:
    """Let a command of `d3etr`, or a script, read its command line, and no more."""
    parser = command_line.parse_arguments

    def parse(*args, **kwargs):
        parser(*args, **kwargs)
        raise Understood

    monkeypatch.setattr(command_line, "parse_arguments", parse)
    with pytest.raises(Understood):
        if words[0] == "d3etr":
            module = import_module(f"d3etr_hf.cli.{words[1].replace('-', '_')}")
            monkeypatch.setattr(module, "parse_arguments", parse, raising=False)
            monkeypatch.setattr(sys, "argv", [f"d3etr {words[1]}", *words[2:]])
            module.main()
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command, monkeypatch):
    """Guards against an option, a file, a target or an extra that is called otherwise by now."""
    monkeypatch.chdir(REPOSITORY)
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", Path("Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extras = re.search(r"\[(.*)\]", words[-1])
        known = read_extras()
        assert words[0] == "install" and set(extras.group(1).split(",") if extras else []) <= known
    elif program == "d3etr":
        assert words[0] in COMMANDS
        understand([program, *words], monkeypatch)
    elif program == "python":
        understand(words, monkeypatch)
    elif program == "accelerate":
        launched = launch_command_parser().parse_args(words[1:])
        module = launched.module
        script = launched.training_script_args
        name = script.pop(0) if module else Path(launched.training_script).stem
        assert words[0] == "launch" and (not module or launched.training_script == "d3etr_hf.cli.main")
        understand(["d3etr", name, *script], monkeypatch)
    elif program == "sbatch":
        assert Path(next(word for word in words if word.endswith(".sh"))).exists() and Path(words[-1]).exists()
    else:
        raise AssertionError(f"no rule for {command!r}")


def read_extras() -> set[str]:
    """Names of the optional dependencies."""
    section = (REPOSITORY / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^(\w+) = \[", section.split("\n[")[0], re.MULTILINE))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which everything is that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("mine", "data/shapes"):
        make_shapes(folder / name, 8, 4, progress=False)
    for name in CHECKPOINTS:
        model_type = next(kind for word, kind in FAMILY_OF.items() if word in name)
        torch.manual_seed(0)
        tiny_model(model_type=model_type).save_pretrained(folder / name)
        size = {"image_size": 64} if model_type in ("d_fine", "rt_detr") else {"short_side": 64, "long_side": 64}
        image_processor_of(model_type, None, **size).save_pretrained(folder / name)
    shutil.copytree(shipped("model_cards") / "shapes_teacher", folder / "runs" / "demo" / "teacher")
    (folder / "photographs").mkdir()
    for number in range(2):
        Image.new("RGB", (120, 90), (40 * number, 90, 120)).save(folder / "photographs" / f"{number}.jpg")
    return folder


FAMILY_OF = {"dfine": "d_fine", "conditional": "conditional_detr", "rtdetr": "rt_detr", "detr-resnet": "detr"}


def test_commands_run(place, fresh_processes):
    """In their order, since some need what others make; trainings take two steps."""
    for command in commands():
        program, name, *words = shlex.split(command)
        if program != "d3etr" or any(word in command for word in ONLY_PARSED):
            continue
        short = SHORT.split() if name in ("train", "distill") else []
        arguments = [word for pattern in words for word in globbed(pattern, place)]
        call(fresh_processes, place, name, *arguments, *short)


def call(fresh_processes, place: Path, name: str, *arguments: str) -> None:
    """`d3etr NAME ARGUMENTS`; one that was called before says that it is done."""
    code = f"import sys; sys.argv = ['d3etr', {name!r}, *sys.argv[1:]]; import d3etr_hf.cli.main as m; m.main()"
    result = fresh_processes.code(code, *arguments, cwd=place)
    assert result.returncode == 0, f"{name} {arguments}\n{result.stdout[-800:]}\n{result.stderr[-2000:]}"


def globbed(word: str, folder: Path) -> list[str]:
    """As a shell replaces a pattern."""
    return sorted(str(path) for path in folder.glob(word)) if "*" in word else [word]


@pytest.mark.parametrize("index", range(len(re.findall(r"```python\n", README))))
def test_snippet_runs(index, place, monkeypatch, fresh_processes):
    """On a small data set and two steps; the first has at most 20 lines of code."""
    snippet = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[index]
    assert index > 0 or len([line for line in snippet.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(place)
    if "write_model_card" in snippet:
        for command in ("train configs/demo/student.yaml", "distill configs/demo/distill.yaml"):
            call(fresh_processes, place, *command.split(), *SHORT.split())
    short = snippet.replace("max_steps=1000", "max_steps=2").replace("per_device_train_batch_size=16", "use_cpu=True")
    assert (short != snippet) == (index == 0)
    exec(compile(short, "README.md", "exec"), {})
    if index == 0:
        assert len(AutoModelForObjectDetection.from_pretrained("runs/student").config.id2label) == 3


def test_first_table_is_the_demos():
    """As its card has measured it; no word is left to be filled in."""
    measured = json.loads((REPOSITORY / "model_cards" / "shapes_student" / "metrics.json").read_text())
    rows = {
        "teacher": measured["teacher"],
        "student, distilled": measured["student"],
        **measured["compared"],
    }
    found = re.findall(
        r"^\| \**(.+?)\** \| ([\d,]+) \| ([\d.]+) \| \**([\d.]+)\** \| ([\d.]+) \|$", README, re.MULTILINE
    )
    assert len(found) == 4 and not re.search(r"DEMO_|TODO", README)
    for title, parameters, milliseconds, ap, ap50 in found:
        row = rows[title.split(", ships")[0]]
        assert int(parameters.replace(",", "")) == row["parameters"], title
        assert [ap, ap50] == [f"{100 * row['metrics'][name]:.1f}" for name in ("AP", "AP50")], title
        timed = row if "milliseconds" in row else measured["student"]
        assert milliseconds == f"{timed['milliseconds']['median']:.1f}", title


def test_comparison():
    """Two seeds of five modes of two students, two pairs beside, and one teacher; the other is a checkpoint."""
    example = read_yaml(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    assert len(plan(Comparison(**example))) == 2 * (5 * 2 + 2) + 1
