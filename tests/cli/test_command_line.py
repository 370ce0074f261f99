import dataclasses
import logging
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.main import COMMANDS, main, run
from d3etr_hf.configurations import read_yaml, shipped
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CommandLineError, TrainingStopped, UserError
from d3etr_hf.runs.description import describe_run

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class DetectorArguments:
    """Stands for the dataclass of a script."""

    folder: str = field(metadata={"help": "A folder."})
    student_config: dict | str | None = field(default=None, metadata={"help": "A configuration or a path."})
    layers: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Some layers."})
    weight: float = field(default=1.0, metadata={"help": "A weight, at least 0."})
    api_token: str | None = field(default=None, metadata={"help": "A secret."})

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")


@dataclass
class StudentTrainingArguments(TrainingArguments):
    """Stands for the package's own training arguments: one new field, one new default."""

    temperature: float = field(default=2.0, metadata={"help": "A temperature."})
    report_to: None | str | list[str] = field(default="all", metadata={"help": "Where to."})


@pytest.fixture
def configuration(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "configuration.yaml"
        path.write_text(text)
        return str(path)

    return write


def read(*argv: str, types=(DetectorArguments,)):
    return parse_arguments(types, list(argv))


def refusal(*argv: str, types=(DetectorArguments,)) -> str:
    with pytest.raises(CommandLineError) as caught:
        read(*argv, types=types)
    return str(caught.value)


def test_flags_override_the_file_and_the_file_overrides_the_defaults(configuration):
    """Guards the order of precedence, also where a flag repeats the dataclass's default."""
    path = configuration("folder: from_file\nweight: 3\nlayers: [4, 5]\nlearning_rate: 2e-4\nmax_steps: 7\n")
    detector, training = read(
        path, "--folder", "../data", "--weight", "1.0", "--max_steps=-1", types=(DetectorArguments, TrainingArguments)
    )
    assert detector == DetectorArguments(folder="../data", weight=1.0, layers=[4, 5])
    assert (training.learning_rate, training.max_steps, training.seed) == (2e-4, -1, 42)


def test_null_takes_back_what_the_file_says(configuration):
    """Else a configuration's model_config could not make way for a checkpoint given by flag."""
    path = configuration("folder: from_file\nstudent_config: {width: 8}\n")
    (detector,) = read(path, "--student_config", "null")
    assert detector.student_config is None


def test_a_required_field_may_come_from_either_place_or_is_missed(configuration):
    """Guards against argparse demanding a flag that the file already gives."""
    assert read(configuration("folder: here"))[0].folder == "here"
    assert read("--folder", "here")[0].folder == "here"
    assert refusal() == "'folder' is required: set it in the configuration file or with --folder"


def test_yaml_means_what_it_seems_to_mean(configuration):
    """Guards against YAML 1.1: 1e-4 read as text, `no` read as false."""
    path = configuration(
        "learning_rate: 1e-4\neval_strategy: no\nbf16: no\ntf32: false\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1e-6}\nlabel_names: [labels]\n"
    )
    (training,) = read(path, types=(TrainingArguments,))
    assert training.learning_rate == 1e-4 and training.bf16 is False and training.tf32 is False
    assert training.eval_strategy.value == "no" and training.lr_scheduler_type is SchedulerType.COSINE_WITH_MIN_LR
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6} and training.label_names == ["labels"]


def test_dictionaries_come_as_mappings_or_as_json(configuration):
    """Guards against JSON that stays a string, and a path that is taken for JSON."""
    expected = {"d_model": 64, "backbone": {"depths": [1, 2]}}
    path = configuration("folder: a\nstudent_config: {d_model: 64, backbone: {depths: [1, 2]}}")
    assert read(path)[0].student_config == expected
    json_text = '{"d_model": 64, "backbone": {"depths": [1, 2]}}'
    assert read("--folder", "a", "--student_config", json_text)[0].student_config == expected
    assert read("--folder", "a", "--student_config", "configs/x.json")[0].student_config == "configs/x.json"
    (training,) = read("--liger_kernel_config", '{"rope": true}', types=(TrainingArguments,))
    assert training.liger_kernel_config == {"rope": True}
    assert "--student_config: not valid JSON" in refusal("--folder", "a", "--student_config", "{d_model: 64}")


def test_lists_on_the_command_line():
    assert read("--folder", "a", "--layers", "3", "4", "5")[0].layers == [3, 4, 5]


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("3: 1", "unknown key '3'; --help lists those there are"),
        ("learning_rate: abc", "'learning_rate' must be of type float, got 'abc' (str)"),
        ("learning_rate: null", "'learning_rate' must be of type float, got None (NoneType)"),
        ("seed: true", "'seed' must be of type int, got True (bool)"),
        ("seed: 1.5", "'seed' must be of type int, got 1.5 (float)"),
        ("label_names: labels", "'label_names' must be of type list[str] | None, got 'labels' (str)"),
        ("lr_scheduler_type: cosin", "cosin is not a valid SchedulerType"),
        ("- seed", "must hold 'key: value' lines, holds a list"),
        ("a: b: c", "not valid YAML: mapping values are not allowed here"),
        ("seed: 1\nseed: 2", 'not valid YAML: found duplicate key "seed" with value "2"'),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_key(configuration, text, message):
    """Guards against a typo in a configuration that silently trains something else."""
    path = configuration(text)
    assert refusal(path, types=(TrainingArguments,)).startswith(f"{path}: {message}")


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    places = f"{Path('configs/none.yaml').resolve()} nor {shipped('configs') / 'none.yaml'}"
    assert refusal("configs/none.yaml") == f"configs/none.yaml: no such configuration file: neither {places}"
    assert refusal(str(tmp_path)).startswith(f"{tmp_path}: cannot be read as a configuration file")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff")
    assert "cannot be read as a configuration file" in refusal(str(tmp_path / "image.yaml"))


def test_an_empty_file_sets_nothing(configuration):
    assert read(configuration("# nothing yet\n"), "--folder", "a") == (DetectorArguments("a"),)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--weigth", "1"], "unknown flag '--weigth'; did you mean '--weight'?"),
        (["--student-confg=1"], "unknown flag '--student-confg'; did you mean '--student_config'?"),
        (["--weig", "1"], "unknown flag '--weig'; did you mean '--weight'?"),
        (["--qqq"], "unknown flag '--qqq'; --help lists those there are"),
        (["--weight", "abc"], "argument --weight: invalid float value: 'abc'"),
        (["--weight", "1", "late.yaml"], "unexpected argument 'late.yaml': one configuration file may come first"),
        (["--weight", "-1"], "command line: weight must be at least 0, got -1.0"),
    ],
)
def test_bad_flags_are_refused(argv, message):
    """Guards against typos, and against argparse completing an abbreviation by itself."""
    assert refusal("--folder", "a", *argv).startswith(message)


def test_no_training_argument_is_without_help():
    """Guards --help when transformers moves: the package adds no help of its own to these fields."""
    without = [
        each.name for each in dataclasses.fields(TrainingArguments) if not each.metadata.get("help", "").strip()
    ]
    assert without == []


def test_help_prints_every_field(capsys):
    """Guards against help texts that argparse cannot format, and a description whose line breaks are lost."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments([DetectorArguments, TrainingArguments], ["--help"], "Runs.\n\n    script.py a.yaml\n")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "Runs.\n\n    script.py a.yaml\n" in printed and "A folder. (required)" in printed
    for each in [*dataclasses.fields(DetectorArguments), *dataclasses.fields(TrainingArguments)]:
        assert f"--{each.name}" in printed


def test_a_written_configuration_reproduces_the_run(configuration, tmp_path):
    """Guards the record of a run: defaults and secrets stay out, text that looks like a number stays text."""
    path = configuration(
        "folder: ../data\nstudent_config: {d_model: 64, dropout: 1e-1}\noutput_dir: runs/a\nrun_name: '1e5'\n"
        "lr_scheduler_type: cosine\nlearning_rate: 1e-5\ntemperature: 3\nreport_to: none\nuse_cpu: true\n"
        "save_strategy: no\nproject: 'no'\nlayers: []\nactivation_checkpointing: true\n"
    )
    types = (DetectorArguments, StudentTrainingArguments)
    original = read(path, "--hub_token", "hf_1", "--api_token", "hf_2", types=types)
    written = tmp_path / "runs" / "a" / "configuration.yaml"
    written.parent.mkdir(parents=True)
    written.write_text(describe_run(*original))
    assert "hf_" not in written.read_text()
    again = read(str(written), types=types)
    original[0].api_token = original[1].hub_token = None
    assert again == original

    values = read_yaml(written.read_text())
    # use_cpu makes TrainingArguments unpin memory; the two names of activation checkpointing mirror each other.
    assert set(values) == {
        *("folder", "student_config", "layers", "output_dir", "run_name", "lr_scheduler_type", "learning_rate"),
        *("temperature", "report_to", "use_cpu", "save_strategy", "project", "dataloader_pin_memory"),
        *("activation_checkpointing", "gradient_checkpointing"),
    }
    assert values["folder"] == "../data"


def test_default_training_arguments_leave_an_empty_record():
    """Guards the list of defaults that TrainingArguments rewrites, which a new transformers may change."""
    assert describe_run(TrainingArguments(output_dir="runs")) == "output_dir: runs\n"


def test_run_turns_user_errors_into_exit_code_2(capsys):
    """Guards against a traceback for a user's mistake, and against hiding the package's own faults."""

    class BadFolder(UserError):
        pass

    def fail(error):
        raise error

    for error in (CommandLineError("no such flag"), BadFolder("no such folder")):
        with pytest.raises(SystemExit) as caught:
            run(lambda error=error: fail(error))
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: {error}\n"
    with pytest.raises(ValueError, match="a fault"):
        run(lambda: fail(ValueError("a fault")))


def test_a_command_reads_its_file_and_flags_and_reports_errors(configuration, tmp_path):
    """Guards the whole way from the shell: a configuration file, a flag, and a mistake."""
    path = configuration("folder: shapes\ntrain_images: 2\nval_images: 5")

    def call(*argv):
        command = [sys.executable, "-m", "d3etr_hf.cli.main", "make-shapes", path, *argv]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    done = call("--val_images", "1")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "shapes" / "train").iterdir())) == 2
    assert len(list((tmp_path / "shapes" / "val").iterdir())) == 1
    refused = call("--val_images", "0")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == "d3etr make-shapes: error: val_images must be at least 1, got 0"
    assert "Traceback" not in refused.stderr


def test_first_argument(capsys):
    """A script that works on a folder takes it first; flags after it still count, and --help says so."""
    types = [DetectorArguments]
    for argv in (["runs/x", "--weight", "0.5"], ["--folder", "runs/x", "--weight", "0.5"]):
        (values,) = parse_arguments(types, argv, first_argument="folder")
        assert (values.folder, values.weight) == ("runs/x", 0.5)
    with pytest.raises(SystemExit):
        parse_arguments(types, ["--help"], first_argument="folder")
    assert "[folder] [--field value ...]" in capsys.readouterr().out


@dataclass
class RenamedArguments:
    """Stands for the training arguments after a renaming."""

    distillation_l1_weight: float = field(default=5.0, metadata={"help": "A weight."})


def test_an_old_name_is_refused_with_the_new_one(configuration):
    """The nearest name would be some other weight."""
    path = configuration("l1_weight: 2")
    message = f"{path}: unknown key 'l1_weight': it is called 'distillation_l1_weight' now"
    assert refusal(path, types=(RenamedArguments,)) == message
    message = "unknown flag '--l1_weight': it is called '--distillation_l1_weight' now"
    assert refusal("--l1_weight", "2", types=(RenamedArguments,)) == message


def call(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, **options)


def test_the_command_lists_its_subcommands_and_names_the_nearest(tmp_path):
    """Light, as nothing of Transformers is imported for it."""
    program = ["-X", "importtime", "-m", "d3etr_hf.cli.main"]
    listed = call(*program, "--help", cwd=tmp_path)
    assert listed.returncode == 0 and " torch" not in listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)
    refused = call("-m", "d3etr_hf.cli.main", "make_shapes", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "d3etr: error: there is no command 'make_shapes'; did you mean 'make-shapes'?\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_subcommand_documents_itself(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["d3etr", command, "--help"])
    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "propagate", True)
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert printed.startswith(f"usage: d3etr {command} [") and f"\n    d3etr {command}" in printed


def test_script_is_its_subcommand(tmp_path):
    """From scripts/, where evaluate.py would hide the `evaluate` package if a command imported it."""
    for command in set(COMMANDS) - {"benchmark"}:  # scripts/benchmark.py measures a step of the distillation
        script = REPOSITORY / "scripts" / f"{command.replace('-', '_')}.py"
        assert f'run_command("{command}")' in script.read_text()
    shown = call(str(REPOSITORY / "scripts" / "distill.py"), "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "usage: d3etr distill [" in shown.stdout, shown.stderr


@pytest.mark.parametrize("stopped", [False, True])
def test_a_command_leaves_its_process_group(tmp_path, stopped):
    """Its threads abort the process when they run on while Python shuts down."""

    def train():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        if stopped:
            raise TrainingStopped("stopped", signal.SIGTERM)

    with pytest.raises(SystemExit) if stopped else nullcontext():
        run(train)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["--help"], ""), (["data", "check"], "1")])
def test_output_that_nobody_reads_ends_a_command_quietly(arguments, unbuffered, tmp_path):
    """As in `d3etr compare FILE --list true | head`: no traceback, also where Python would flush at its end."""
    if arguments[0] == "data":
        arguments = [*arguments, str(make_shapes(tmp_path / "shapes", 2, 2, image_size=64, progress=False))]
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "d3etr_hf.cli.main", *arguments]
    with os.fdopen(writing, "wb") as pipe:
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=environment, text=True, timeout=60)
    assert result.returncode == 141
    assert "Error" not in result.stderr and "Traceback" not in result.stderr


FAILS = """
from d3etr_hf.cli.main import quiet_once_nobody_reads, run
from d3etr_hf.errors import UserError

def main():
    print("what was done")
    raise UserError("what is wrong")

with quiet_once_nobody_reads():
    run(main)
"""


def test_an_error_is_told_though_nobody_reads_the_output():
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""}
    with os.fdopen(writing, "wb") as pipe:
        result = subprocess.run(
            [sys.executable, "-c", FAILS], stdout=pipe, stderr=subprocess.PIPE, env=environment, text=True, timeout=60
        )
    assert result.returncode == 2 and result.stderr == "-c: error: what is wrong\n"


def test_a_closed_output_is_no_error():
    """As `>&-` leaves it, and some who start programs in the background."""
    command = [sys.executable, "-c", "from d3etr_hf.cli.main import main; main()", "--version"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        command, preexec_fn=partial(os.close, 1), stderr=subprocess.PIPE, env=environment, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_broken_pipe_that_is_not_the_output_keeps_its_traceback():
    def lose_a_worker():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run(lose_a_worker)
