"""One run in one output folder: guarded, resumed where it stopped, and done once."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ConditionalDetrImageProcessorPil

from d3etr_hf.cli import main as command_line
from d3etr_hf.cli import training_run as runs
from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.evaluate import evaluate_detector
from d3etr_hf.cli.train import without_distillation
from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.configurations import read_yaml
from d3etr_hf.data import DataArguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import (
    BatchSizeError,
    CheckpointError,
    CommandLineError,
    DamagedFileError,
    DatasetError,
    DetectorLoadError,
    FolderInUseError,
    ImageSizeError,
    OutputFolderError,
    WriteError,
)
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.publishing.run_folder import load_run
from d3etr_hf.runs import output_folder
from d3etr_hf.runs.description import describe_run
from d3etr_hf.runs.output_folder import (
    check_output_folder,
    refuse_split_launch,
)
from d3etr_hf.training import step_probe
from d3etr_hf.training.stopping import STOPPING
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import tiny_config, tiny_model

SIDE = 64
TYPES = (ModelArguments, TeacherArguments, DataArguments, D3etrTrainingArguments)


class Interruption(Exception):
    """Stands for whatever stops a run."""


def model_config() -> dict:
    """The tiny detector's options, as a configuration file would hold them; dropout makes the random state count."""
    config = tiny_config()
    names = ("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    names += ("encoder_ffn_dim", "decoder_ffn_dim", "num_queries")
    backbone = {"model_type": "convnext", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
    backbone |= {"out_features": ["stage2"], "layer_scale_init_value": 1.0}
    return {name: getattr(config, name) for name in names} | {"dropout": 0.1, "backbone_config": backbone}


def arguments(data, output, teacher=None, augmentation="flip", **training) -> tuple:
    """What a script would hand to `train_detector`: two steps make an epoch and a checkpoint."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if teacher is None:
        defaults |= {"auxiliary_queries": "none", "adaptive_matching": False}
    return (
        ModelArguments(model_config=model_config()),
        TeacherArguments(teacher=None if teacher is None else str(teacher)),
        DataArguments(data_folder=str(data), short_side=SIDE, long_side=SIDE, augmentation=augmentation),
        D3etrTrainingArguments(output_dir=str(output), **(defaults | training)),
    )


def stop_at_step(monkeypatch, step: int) -> None:
    """Make training fail in its `step`-th step, counted from 1 and from the beginning of the run."""
    original = D3etrTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise Interruption
        return original(self, *args, **kwargs)

    monkeypatch.setattr(D3etrTrainer, "training_step", training_step)


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(folder, reference) -> None:
    own, wanted = (load_file(place / "model.safetensors") for place in (folder, reference))
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 16, 8, image_size=SIDE, progress=False)


LAUNCH = {"processes": 1, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model(seed=1).save_pretrained(folder)
    load_image_processor(None, SIDE, SIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """The folder of a run of four steps that nothing stopped, and what it returned."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    return output, train_detector(*arguments(shapes, output))


# the output folder


def test_free_folders_are_free(shapes, tmp_path):
    configuration = describe_run(*arguments(shapes, tmp_path))
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty", configuration, LAUNCH)
    check_output_folder(tmp_path / "absent", configuration, LAUNCH)
    assert not (tmp_path / "absent").exists() and not list((tmp_path / "empty").iterdir())


def test_folder_that_is_no_run_is_refused(shapes, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputFolderError, match=f"{tmp_path} is not empty and holds no run.yaml"):
        train_detector(*arguments(shapes, tmp_path))
    assert files_of(tmp_path) == {"thesis.tex": b"years of work"}


def test_another_run_is_refused_and_nothing_touched(shapes, finished):
    """The first differing key and both values are named, an absent one as the default."""
    output, _ = finished
    before = files_of(output)
    with pytest.raises(OutputFolderError, match=r"another run: .*learning_rate \(0\.001 there, 0\.002 here\)"):
        train_detector(*arguments(shapes, output, learning_rate=2e-3))
    with pytest.raises(
        OutputFolderError, match=r"differs in seed \('default' there, 3 here\); choose another output_dir"
    ):
        train_detector(*arguments(shapes, output, seed=3))
    assert files_of(output) == before


def test_the_same_values_written_another_way_are_the_same_run(shapes, tmp_path):
    configuration = describe_run(*arguments(shapes, tmp_path / "run"))
    values = read_yaml(configuration)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(json.dumps(values, sort_keys=True))
    check_output_folder(tmp_path / "run", configuration, LAUNCH)
    # called by another path, or moved
    moved = describe_run(*arguments(shapes, tmp_path / "somewhere" / ".." / "run"))
    assert moved != configuration
    check_output_folder(tmp_path / "run", moved, LAUNCH)


def test_description_builds_the_run_again(shapes, teacher, tmp_path):
    """Whoever finds the folder can repeat the run: `d3etr distill run.yaml`."""
    given = arguments(shapes, tmp_path / "run", teacher=teacher, layer_map=[0, 1, 2])
    (tmp_path / "run.yaml").write_text(describe_run(*given))
    again = parse_arguments(TYPES, [str(tmp_path / "run.yaml")])
    assert again[:3] == given[:3]
    assert again[3].to_dict() == given[3].to_dict()


def test_folder_without_a_checkpoint_is_free_for_a_corrected_call(shapes, tmp_path):
    """A run that failed in its first step had saved nothing: lowering its learning rate must not be refused."""
    first, second = (describe_run(*arguments(shapes, tmp_path, learning_rate=rate)) for rate in (1e5, 1e-3))
    (tmp_path / "run.yaml").write_text(first)
    check_output_folder(tmp_path, second, LAUNCH)


@pytest.mark.parametrize("change", [{"processes": 2}, {"mixed_precision": "bf16"}])
def test_run_goes_on_only_as_it_was_launched(shapes, finished, change):
    """On another number of processes it would end after another number of epochs and call itself finished."""
    output, _ = finished
    configuration = describe_run(*arguments(shapes, output))
    check_output_folder(output, configuration, LAUNCH)
    with pytest.raises(OutputFolderError, match=next(iter(change))):
        check_output_folder(output, configuration, LAUNCH | change)


def test_workers_and_reports_may_change(shapes, finished):
    output, _ = finished
    changed = describe_run(*arguments(shapes, output, dataloader_num_workers=2, save_total_limit=3))
    check_output_folder(output, changed, LAUNCH)


def test_processes_that_do_not_know_of_each_other_are_refused(shapes, tmp_path, monkeypatch):
    args = arguments(shapes, tmp_path)[3]
    refuse_split_launch(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OutputFolderError, match="2 processes were launched, but each sees 1.*use_cpu"):
        refuse_split_launch(args)


def test_plain_training_refuses_options_of_the_distillation(tmp_path):
    """The teacherless configuration run by `d3etr train` would be a plain student under a false name."""
    args = D3etrTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, auxiliary_queries="learned", distillation_l1_weight=2.0
    )
    with pytest.raises(CommandLineError, match=r"\['auxiliary_queries', 'distillation_l1_weight'\].*d3etr distill"):
        without_distillation(args)


def test_run_of_an_earlier_version_says_what_was_renamed(shapes, tmp_path, monkeypatch):
    """Else it would be another run that differs in an option which nobody can set any more."""
    monkeypatch.setitem(output_folder.RENAMED_OPTIONS, "gone_weight", "new_weight")
    configuration = describe_run(*arguments(shapes, tmp_path))
    (tmp_path / "run.yaml").write_text(f"{configuration}gone_weight: 2.0\n")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(
        OutputFolderError,
        match="run.yaml is of an earlier version: 'gone_weight' is called 'new_weight' now; rename it in that file",
    ):
        check_output_folder(tmp_path, configuration, LAUNCH)


def test_what_a_kill_left_of_the_first_file_is_no_content(shapes, tmp_path):
    """Killed while it wrote run.yaml: the folder must not be refused for ever."""
    for name in ("lock", "run.yaml.unfinished"):
        (tmp_path / name).write_text("learning_r")
    check_output_folder(tmp_path, describe_run(*arguments(shapes, tmp_path)), LAUNCH)


@pytest.mark.parametrize(
    "name, content, remedy",
    [
        ("run.yaml", "", "choose another output_dir, or empty this one"),
        ("run.yaml", "seed: [1,", "choose another output_dir, or empty this one"),
        ("run.yaml", "seed: 1\n: 1\n", "choose another output_dir, or empty this one"),
        ("launch.json", "[]", "remove it, and start the run on as many processes"),
        ("results.json", "3", "remove it and call the run again"),
        ("launch.json", '{"proc', "remove it, and start the run on as many processes"),
        ("launch.json", "[1]", "remove it, and start the run on as many processes"),
        ("results.json", "", "remove it and call the run again"),
        ("results.json", "[" * 100_000, "remove it and call the run again"),
        ("results.json", "3", "remove it and call the run again"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_the_remedy(shapes, finished, tmp_path, name, content, remedy):
    output = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (output / name).write_text(content)
    with pytest.raises(DamagedFileError, match=f"{output / name} is damaged.*{remedy}") as caught:
        train_detector(*arguments(shapes, output))
    assert "\n" not in str(caught.value)


def test_places_that_are_no_folder_are_refused_before_anything_is_read(shapes, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputFolderError, match=f"{output} cannot be used as a folder .*choose another"):
            train_detector(*arguments(tmp_path / "no_data", output))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    """Root may write anywhere, so the file system's answer is put in."""
    original = Path.open

    def read_only(self, mode="r", *args, **options):
        if self.parent == tmp_path and mode != "r":
            raise OSError(30, "Read-only file system")
        return original(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(WriteError, match="cannot be written .Read-only file system.*choose another place"):
        train_detector(*arguments(tmp_path / "no_data", tmp_path))


HOLD = """
import sys
from pathlib import Path
from d3etr_hf.runs.folder_lock import holding
with holding(Path(sys.argv[1]), "a run"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time_in_a_folder(tmp_path):
    """Until the process that holds it ends, however it does."""
    output = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(output)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(
        FolderInUseError, match=rf"{output}: another training run is at work there \(process {other.pid} on .*\bend it"
    ):
        train_detector(*arguments(tmp_path / "no_data", output))
    other.kill()
    other.wait()
    with pytest.raises(DatasetError):  # now it gets as far as the data
        train_detector(*arguments(tmp_path / "no_data", output))


def test_a_checkpoint_that_is_asked_for_is_gone_on_from_or_refused(shapes, finished, tmp_path, monkeypatch):
    output = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (output / "results.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-3 is no checkpoint .*: there is no such folder"):
        train_detector(*arguments(shapes, output, resume_from_checkpoint=str(output / "checkpoint-3")))
    elsewhere = str(finished[0] / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"={elsewhere} is not in {output}, .* its weights, --model {elsewhere}"):
        train_detector(*arguments(shapes, output, resume_from_checkpoint=elsewhere))
    asked = str(output / "checkpoint-2")
    with monkeypatch.context() as context:
        stop_at_step(context, 3)
        with pytest.raises(Interruption):
            train_detector(*arguments(shapes, output, resume_from_checkpoint=asked))
    assert "resume_from_checkpoint" not in (output / "run.yaml").read_text()
    optimizer = output / "checkpoint-2" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="checkpoint-2 is no checkpoint .*: its optimizer.pt has "):
        train_detector(*arguments(shapes, output, resume_from_checkpoint=asked))


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_finished_run_without_its_model_gets_it_back(shapes, finished, tmp_path, caplog, damage):
    """From the checkpoint that has the same weights, byte for byte; else it is refused."""
    output, weights = Path(shutil.copytree(finished[0], tmp_path / "run")), finished[0] / "model.safetensors"
    model = output / "model.safetensors"

    def spoil() -> None:
        model.write_bytes(weights.read_bytes()[: 1000 if damage == "cut" else 0])
        if damage == "gone":
            model.unlink()

    spoil()
    assert train_detector(*arguments(shapes, output)) == finished[1]
    assert model.read_bytes() == weights.read_bytes()
    assert "holds " in caplog.text and f"was restored from {output / 'checkpoint-4'}" in caplog.text
    spoil()
    shutil.rmtree(output / "checkpoint-4")
    with pytest.raises(OutputFolderError, match="model.safetensors.*no checkpoint .* remove .*results.json and call"):
        train_detector(*arguments(shapes, output))


def test_other_weights_than_were_measured_are_not_written_over(shapes, finished, tmp_path):
    output = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.copy(output / "checkpoint-2" / "model.safetensors", output)
    before = files_of(output)
    with pytest.raises(OutputFolderError, match="holds other weights than its results.json .* move model.safetensors"):
        train_detector(*arguments(shapes, output))
    assert files_of(output) == before


# time


# whole runs


def test_finished_run_holds_its_results_and_returns_them_without_training(shapes, finished, monkeypatch, caplog):
    output, results = finished
    assert results["steps"] == 4 and results["seconds"] > 0
    assert {"AP", "AP50"} <= results.keys() and 0 <= results["AP"] <= results["AP50"] <= 1
    weights = load_file(output / "model.safetensors")
    assert results["parameters"] == sum(value.numel() for value in weights.values())
    assert json.loads((output / "results.json").read_text()) == results
    losses = [entry["loss"] for entry in json.loads((output / "log_history.json").read_text()) if "loss" in entry]
    assert len(losses) == 4
    assert load_image_processor(str(output)).size["shortest_edge"] == SIDE

    def fail(*args, **kwargs):
        raise AssertionError("a finished run must load nothing")

    monkeypatch.setattr(runs, "load_splits", fail)
    monkeypatch.setattr(runs, "build_model", fail)
    before = files_of(output)
    assert train_detector(*arguments(shapes, output)) == results
    assert files_of(output) == before
    assert f"{output} holds this run already" in caplog.text
    with pytest.raises(OutputFolderError, match=r"checkpoint-2.: .* holds this run finished; leave .*--model .*-2 --"):
        train_detector(*arguments(shapes, output, resume_from_checkpoint=str(output / "checkpoint-2")))
    with pytest.raises(
        OutputFolderError, match=rf"max_steps 4, and cannot go on to max_steps 6: .*--model {output} --output_dir"
    ):
        train_detector(*arguments(shapes, output, max_steps=6))
    assert files_of(output) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 4, "augmentation": "paper"}],
    ids=["after an epoch", "within an epoch"],
)
def test_interrupted_run_ends_as_the_uninterrupted_one(shapes, tmp_path, monkeypatch, options):
    """Stopped in step 3 after the checkpoint of step 2: data order, dropout, optimizer, rate and augmentation."""
    uninterrupted, output = tmp_path / "whole", tmp_path / "stopped"
    expected = train_detector(*arguments(shapes, uninterrupted, **options))
    with monkeypatch.context() as context:
        stop_at_step(context, 3)
        with pytest.raises(Interruption):
            train_detector(*arguments(shapes, output, **options))
    assert not (output / "results.json").exists() and (output / "checkpoint-2").is_dir()
    spent = json.loads((output / "seconds.json").read_text())

    with monkeypatch.context() as context:
        stop_at_step(context, 2)  # would stop a run that begins again
        results = train_detector(*arguments(shapes, output, **options))
    assert_same_weights(output, uninterrupted)
    assert results["AP"] == expected["AP"] and results["steps"] == 4
    assert results["seconds"] > spent["seconds"] > 0
    histories = [json.loads((folder / "log_history.json").read_text()) for folder in (output, uninterrupted)]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("number", "step", "steps"), [(signal.SIGUSR1, 2, 5), (signal.SIGINT, 1, 4)])
def test_signal_ends_a_run_after_its_step_with_a_checkpoint(shapes, tmp_path, monkeypatch, capfd, number, step, steps):
    """At the end of an epoch after its evaluation; nothing of it shows in the run that goes on."""
    options = {"save_strategy": "no", "eval_strategy": "epoch", "max_steps": steps}
    outputs = tmp_path / "whole", tmp_path / "stopped"
    train_detector(*arguments(shapes, outputs[0], **options))
    capfd.readouterr()
    original, handlers = D3etrTrainer.training_step, [signal.getsignal(n) for n in STOPPING]

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            signal.raise_signal(number)
            signal.raise_signal(number)  # a launcher hands it on
        return original(self, *args, **kwargs)

    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "handlers", [])  # a command adds its own
    monkeypatch.setattr("sys.argv", ["d3etr train", "run.yaml", "--output_dir", "my runs"])
    with monkeypatch.context() as context, pytest.raises(SystemExit) as ended:
        context.setattr(D3etrTrainer, "training_step", training_step)
        command_line.run(lambda: train_detector(*arguments(shapes, outputs[1], **options)))
    assert ended.value.code == 128 + number
    assert handlers == [signal.getsignal(n) for n in STOPPING]
    said = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]
    checkpoint = outputs[1] / f"checkpoint-{step}"
    assert said[-1] == "d3etr train run.yaml --output_dir 'my runs'" and len(said) <= 5
    assert said[-2] == (
        f"d3etr train: stopped by {signal.Signals(number).name} after step {step} of {steps}: {checkpoint}; to go on:"
    )
    assert checkpoint.is_dir() and not (outputs[1] / "results.json").exists()
    train_detector(*arguments(shapes, outputs[1], **options))
    own, wanted = (load_file(place / "model.safetensors") for place in outputs)
    assert all(torch.equal(value, wanted[name]) for name, value in own.items())


def test_distilled_run_goes_on_with_its_teacher(shapes, teacher, tmp_path, monkeypatch):
    """The auxiliary queries and the matching need nothing that a checkpoint lacks."""
    outputs = tmp_path / "whole", tmp_path / "stopped"
    options = {"teacher": teacher, "augmentation": "none", "max_steps": 2, "save_steps": 1}
    train_detector(*arguments(shapes, outputs[0], **options))
    with monkeypatch.context() as context:
        stop_at_step(context, 2)
        with pytest.raises(Interruption):
            train_detector(*arguments(shapes, outputs[1], **options))
    train_detector(*arguments(shapes, outputs[1], **options))
    assert_same_weights(*outputs)


@pytest.fixture(scope="module")
def under_way(shapes, teacher, tmp_path_factory):
    """A folder with a distilled run of two steps that was stopped after the first, its data and its teacher."""
    place = tmp_path_factory.mktemp("under way")
    for name, folder in (("data", shapes), ("teacher", teacher)):
        shutil.copytree(folder, place / name)
    with pytest.MonkeyPatch.context() as context, pytest.raises(Interruption):
        stop_at_step(context, 2)
        train_detector(*run_under_way(place))
    return place


def run_under_way(place, **changes) -> tuple:
    options = {"teacher": place / "teacher", "augmentation": "none", "max_steps": 2, "save_steps": 1}
    return arguments(place / "data", place / "run", **(options | changes))


def swap_last_bytes(path) -> None:
    """Another content of the same size."""
    content = path.read_bytes()
    path.write_bytes(content[:-40] + content[-20:] + content[-40:-20])


def repaint(folder) -> None:
    """One image in other colours."""
    path = min(folder.iterdir())
    Image.open(path).rotate(180).save(path)


def shift_a_box(path) -> None:
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content))


def resample_nearest(path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 0}))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("data/annotations/train.json", shift_a_box, "the training annotations (other content)"),
        ("data/annotations/val.json", shift_a_box, "the validation annotations (other content)"),
        ("data/train", repaint, "the training images"),
        ("teacher/model.safetensors", swap_last_bytes, "the teacher (other content)"),
        ("teacher/preprocessor_config.json", resample_nearest, "the teacher"),
    ],
)
def test_a_run_whose_inputs_have_changed_does_not_go_on(under_way, tmp_path, file, change, named):
    place = shutil.copytree(under_way, tmp_path / "place")
    change(place / file)
    before = files_of(place / "run")
    with pytest.raises(OutputFolderError, match=re.escape(named)) as refused:
        train_detector(*run_under_way(place))
    assert "choose another output_dir" in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert files_of(place / "run") == before


def test_a_run_that_begins_does_not_look_at_what_was_read_before(under_way, tmp_path):
    """Of a call that had saved nothing."""
    place = shutil.copytree(under_way, tmp_path / "place")
    shutil.rmtree(place / "run" / "checkpoint-1")
    (place / "run" / "inputs.json").write_text("nul")
    train_detector(*run_under_way(place, max_steps=1))
    assert "teacher" in json.loads((place / "run" / "inputs.json").read_text())


def test_a_run_goes_on_where_it_and_all_that_it_reads_were_copied(under_way, tmp_path):
    """Other paths, other times; the same content."""
    train_detector(*run_under_way(shutil.copytree(under_way, tmp_path / "copied", copy_function=shutil.copyfile)))


def refuse_large_batches(monkeypatch, most: int) -> None:
    """Make a GPU of this machine whose memory holds so many images."""
    original = D3etrTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["pixel_values"]) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(D3etrTrainer, "training_step", training_step)
    monkeypatch.setattr(step_probe, "FEWEST_STEPS", 1)


def test_auto_find_batch_size_from_probe_to_a_run_that_goes_on(shapes, teacher, tmp_path, monkeypatch):
    """Killed after its first checkpoint, it ends as a run that was given the size that it found."""
    given, found = tmp_path / "given", tmp_path / "found"
    train_detector(*arguments(shapes, given, teacher, per_device_train_batch_size=4))
    refuse_large_batches(monkeypatch, 4)
    with monkeypatch.context() as context:
        stop_at_step(context, 4)
        with pytest.raises(Interruption):
            train_detector(*arguments(shapes, found, teacher, auto_find_batch_size=True))
    saved = json.loads((found / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["train_batch_size"] == 4 and saved["epoch"] == 0.5
    assert train_detector(*arguments(shapes, found, teacher, auto_find_batch_size=True))["steps"] == 4
    own, wanted = (load_file(place / "model.safetensors") for place in (found, given))
    assert all(torch.equal(own[name], wanted[name]) for name in own.keys() | wanted.keys())


def test_a_batch_that_does_not_fit_leaves_the_folder_free(shapes, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    refuse_large_batches(monkeypatch, 4)
    with pytest.raises(BatchSizeError, match="per_device_train_batch_size=8: a batch of images of 64×64 pixels"):
        train_detector(*arguments(shapes, output))
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no"}
    assert train_detector(*arguments(shapes, output, **options))["steps"] == 1
    assert "1 steps end about" in capsys.readouterr().out


def test_call_that_fails_on_its_arguments_leaves_the_folder_free(shapes, tmp_path):
    """The call with the mistake put right is not taken for another run."""
    output = tmp_path / "run"
    with pytest.raises(DatasetError):
        train_detector(*arguments(tmp_path / "no_data", output))
    with pytest.raises(DetectorLoadError, match="teacher"):
        train_detector(*arguments(shapes, output, teacher=tmp_path / "no_teacher"))
    assert [path.name for path in output.iterdir()] == ["lock"]
    assert train_detector(*arguments(shapes, output, max_steps=1, save_strategy="no"))["steps"] == 1


def test_teacher_is_looked_for_before_the_data_is_read(tmp_path):
    """A slip in its name costs seconds, not the reading of a large data set and retries on the Hub."""
    make_shapes(tmp_path / "data", 1, 1, image_size=SIDE, progress=False)
    (tmp_path / "data" / "annotations" / "train.json").write_text("cannot be read")
    with pytest.raises(DetectorLoadError, match="teacher .*no such folder"):
        train_detector(*arguments(tmp_path / "data", tmp_path / "run", teacher=tmp_path / "no_teacher"))


def test_squares_from_training_to_evaluation(shapes, teacher, tmp_path):
    """One size for both models where it is given; the processor that is saved, and evaluation.json, tell it."""
    for name, model in (("teacher", tiny_model(seed=1)), ("student", tiny_model(seed=2))):
        model.save_pretrained(tmp_path / name)
        size = {"height": 640, "width": 640}
        ConditionalDetrImageProcessorPil(size=size).save_pretrained(tmp_path / name)
    _, *others = arguments(shapes, tmp_path / "run", tmp_path / "teacher", max_steps=1, save_steps=1)
    teacher_arguments, _, training = others
    data = DataArguments(data_folder=str(shapes), image_size=SIDE)
    train_detector(ModelArguments(model=str(tmp_path / "student")), teacher_arguments, data, training)
    saved = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": SIDE, "width": SIDE}
    data = DataArguments(data_folder=str(shapes))
    found = evaluate_detector(data, str(tmp_path / "run"), str(tmp_path / "evaluation"), use_cpu=True)
    told = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert (told["height"], told["width"]) == (SIDE, SIDE) and "short_side" not in told
    assert found["AP"] == json.loads((tmp_path / "run" / "results.json").read_text())["AP"]
    evaluate_detector(DataArguments(data_folder=str(shapes)), str(teacher), str(tmp_path / "evaluation"), use_cpu=True)
    told = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert (told["short_side"], told["long_side"]) == (SIDE, SIDE) and "height" not in told


def test_a_teacher_of_squares_teaches_at_its_own_size(shapes, tmp_path):
    """A student by its short side: the card tells what the teacher saw."""
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    squares = ConditionalDetrImageProcessorPil(size={"height": 48, "width": 48})
    squares.save_pretrained(tmp_path / "teacher")
    tiny_model(seed=2).save_pretrained(tmp_path / "student")
    load_image_processor(None, SIDE, SIDE).save_pretrained(tmp_path / "student")
    _, *others = arguments(shapes, tmp_path / "run", tmp_path / "teacher", max_steps=1, save_steps=1)
    train_detector(ModelArguments(model=str(tmp_path / "student")), *others)
    run = load_run(tmp_path / "run")
    assert run.taught_at == [48, 48] and run.val[0]["pixel_values"].shape[1:] == (SIDE, SIDE)


def test_a_new_model_of_windows_is_trained_at_sizes_that_it_takes(shapes, tmp_path):
    """By default: half of the sizes that others draw would be refused in the middle of a run."""
    backbone = {"model_type": "lw_detr_vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone |= {"patch_size": 16, "num_windows": 16, "window_block_indices": [0], "out_features": ["stage2"]}
    options = {"d_model": 32, "decoder_layers": 2, "num_queries": 7, "projector_scale_factors": [1.0]}
    config = {"model_type": "lw_detr", "backbone_config": backbone} | options
    _, *others = arguments(shapes, tmp_path / "run")
    others[1] = DataArguments(data_folder=str(shapes))
    trainer = runs.build_trainer(ModelArguments(model_config=config), *others)
    assert dict(trainer.processing_class.size) == {"height": 640, "width": 640}
    drawn = trainer.train_dataset.transform.augmentation.batch_sizes
    assert sorted(set(drawn)) == [(side, side) for side in (512, 576, 640, 704, 768)]
    others[1] = DataArguments(data_folder=str(shapes), augmentation_short_sides=[640, 480])
    with pytest.raises(ImageSizeError, match="train_dataset has, for the student, an image of 480 x 480 .* of 64;"):
        runs.build_trainer(ModelArguments(model_config=config), *others)
    others[1] = DataArguments(data_folder=str(shapes), image_size=608)
    with pytest.raises(ImageSizeError, match="an image of 608 x 608 pixels: .* of 64;.*image_size"):
        runs.build_trainer(ModelArguments(model_config=config), *others)


def test_model_that_goes_on_keeps_its_own_image_processor(shapes, teacher, tmp_path):
    """A new model takes its teacher's; one that is loaded was trained on pixels of its own."""
    tiny_model(seed=3).save_pretrained(tmp_path / "model")
    processor = load_image_processor(None, SIDE, SIDE)
    theirs, processor.resample = processor.resample, 0
    processor.save_pretrained(tmp_path / "model")
    new, *others = arguments(shapes, tmp_path / "run", teacher)
    assert runs.build_trainer(new, *others).processing_class.resample == theirs
    loaded = ModelArguments(model=str(tmp_path / "model"))
    assert runs.build_trainer(loaded, *others).processing_class.resample == 0


def test_it_is_said_who_learns_and_who_teaches(shapes, teacher, tmp_path, caplog):
    """Guards a teacher that is announced as if it trained."""
    with caplog.at_level(logging.INFO, logger="d3etr_hf"):
        trainer = runs.build_trainer(*arguments(shapes, tmp_path / "run", teacher))
    count = sum(parameter.numel() for parameter in trainer.teacher.detector.parameters())
    said = [record.getMessage() for record in caplog.records]
    assert sum("parameters" in line for line in said) == 2
    assert f"teacher: Conditional DETR, {count:,} parameters, from {teacher}; it teaches and stays as it is" in said
    (learns,) = [line for line in said if line.startswith("trained: Conditional DETR, ")]
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert f"{trained:,} parameters in " in learns and learns.endswith("and 0 in 0 that stay as they are")


def test_a_finished_run_of_a_constant_learning_rate_goes_on(shapes, tmp_path):
    """Four steps, and then four more, are the run of eight steps; curves are there, of all steps."""
    options = {"lr_scheduler_type": "constant", "save_total_limit": 1}
    train_detector(*arguments(shapes, tmp_path / "whole", **options, max_steps=8))
    output = tmp_path / "longer"
    first = train_detector(*arguments(shapes, output, **options))
    assert (output / "curves.png").exists()
    (output / "detections.png").touch()  # of the model as it was
    results = train_detector(*arguments(shapes, output, **options, max_steps=8))
    assert (first["steps"], results["steps"]) == (4, 8) and results["seconds"] > first["seconds"]
    assert_same_weights(output, tmp_path / "whole")
    assert not (output / "detections.png").exists() and (output / "curves.png").exists()
    assert read_yaml((output / "run.yaml").read_text())["max_steps"] == 8
    with pytest.raises(OutputFolderError, match=r"differs in max_steps \(8 there, 4 here\)"):
        train_detector(*arguments(shapes, output, **options))


def test_a_finished_run_that_cannot_go_on_names_the_way(shapes, finished, tmp_path):
    output, _ = finished
    before = files_of(output)
    with pytest.raises(OutputFolderError, match=f"cannot go on to max_steps 8: its learning .*--model {output} --out"):
        train_detector(*arguments(shapes, output, max_steps=8))
    assert files_of(output) == before
    options = {"lr_scheduler_type": "constant", "save_strategy": "no", "max_steps": 1}
    train_detector(*arguments(shapes, tmp_path / "kept", **options))
    with pytest.raises(OutputFolderError, match="finished, without a checkpoint to go on from.*--model"):
        train_detector(*arguments(shapes, tmp_path / "kept", **(options | {"max_steps": 2})))
    assert (tmp_path / "kept" / "results.json").exists()


def test_a_run_that_stopped_early_is_not_made_longer(shapes, tmp_path):
    """It would take no step, and lose its results."""
    stopping = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2, "metric_for_best_model": "AP"}
    options = {"lr_scheduler_type": "constant", "save_steps": 1, "learning_rate": 0.0, "backbone_learning_rate": 0.0}
    output = tmp_path / "stopped"
    assert train_detector(*arguments(shapes, output, **options, **stopping))["steps"] == 3
    before = files_of(output)
    with pytest.raises(OutputFolderError, match=f"stopped early, since in 2 eval.*--model {output} .*without early_s"):
        train_detector(*arguments(shapes, output, **options, **stopping, max_steps=10))
    assert files_of(output) == before
