"""One run in one output folder: guarded, resumed where it stopped, and done once."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ConditionalDetrImageProcessorPil, TrainerControl, TrainerState

from d3etr_hf.cli import training_run as runs
from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.evaluate import evaluate_detector
from d3etr_hf.cli.train import without_distillation
from d3etr_hf.cli.training_run import Stopwatch, train_detector
from d3etr_hf.configurations import read_yaml
from d3etr_hf.data import DataArguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CommandLineError, DatasetError, DetectorLoadError, ImageSizeError, OutputFolderError
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.publishing.run_folder import load_run
from d3etr_hf.runs import output_folder
from d3etr_hf.runs.description import describe_run
from d3etr_hf.runs.output_folder import (
    check_output_folder,
    last_complete_checkpoint,
    refuse_split_launch,
    write_json,
)
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
    assert check_output_folder(tmp_path / "empty", configuration, LAUNCH) is None
    assert check_output_folder(tmp_path / "absent", configuration, LAUNCH) is None
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
    assert check_output_folder(tmp_path / "run", configuration, LAUNCH) is None
    # called by another path, or moved
    moved = describe_run(*arguments(shapes, tmp_path / "somewhere" / ".." / "run"))
    assert moved != configuration and check_output_folder(tmp_path / "run", moved, LAUNCH) is None


def test_description_builds_the_run_again(shapes, teacher, tmp_path):
    """Whoever finds the folder can repeat the run: `d3etr distill run.yaml`."""
    given = arguments(shapes, tmp_path / "run", teacher=teacher, layer_map=[0, 1, 2])
    (tmp_path / "run.yaml").write_text(describe_run(*given))
    again = parse_arguments(TYPES, [str(tmp_path / "run.yaml")])
    assert again[:3] == given[:3]
    assert again[3].to_dict() == given[3].to_dict()


def test_folder_without_a_checkpoint_is_free_for_a_corrected_call(shapes, tmp_path):
    """A run that failed in its first step had saved nothing: lowering its learning rate must not be refused."""
    first, second = (describe_run(*arguments(shapes, tmp_path, learning_rate=rate)) for rate in (1e30, 1e-3))
    (tmp_path / "run.yaml").write_text(first)
    assert check_output_folder(tmp_path, second, LAUNCH) is None


@pytest.mark.parametrize("change", [{"processes": 2}, {"mixed_precision": "bf16"}])
def test_run_goes_on_only_as_it_was_launched(shapes, finished, change):
    """On another number of processes it would end after another number of epochs and call itself finished."""
    output, _ = finished
    configuration = describe_run(*arguments(shapes, output))
    assert check_output_folder(output, configuration, LAUNCH) == str(output / "checkpoint-4")
    with pytest.raises(OutputFolderError, match=next(iter(change))):
        check_output_folder(output, configuration, LAUNCH | change)


def test_workers_and_reports_may_change(shapes, finished):
    output, _ = finished
    changed = describe_run(*arguments(shapes, output, dataloader_num_workers=2, save_total_limit=3))
    assert check_output_folder(output, changed, LAUNCH) == str(output / "checkpoint-4")


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


# checkpoints


def test_last_complete_checkpoint_is_found_by_number(tmp_path, caplog):
    """By number, not by name: 1000 is after 250; what is no checkpoint does not count."""
    assert last_complete_checkpoint(tmp_path) is None
    for name in ("checkpoint-250", "checkpoint-1000", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1000")
    assert not caplog.text


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1.0, "log_hist'])
def test_half_written_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, content):
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    if content is not None:
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(content)
    caplog.set_level(logging.WARNING)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert f"{tmp_path / 'checkpoint-4'} is incomplete" in caplog.text


def test_trainer_state_is_written_after_all_that_a_run_goes_on_from(finished):
    """What makes `last_complete_checkpoint` right; should Transformers change the order, this fails."""
    checkpoint = finished[0] / "checkpoint-4"
    state = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (checkpoint / name).stat().st_mtime_ns <= state, name


# time


def test_stopwatch_counts_steps_only_and_across_interruptions(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()

    def after(seconds, call):
        now[0] += seconds
        call(None, state, control)

    watch = Stopwatch(tmp_path)
    after(50, watch.on_train_begin)  # loading
    after(2, watch.on_step_end)
    after(30, watch.on_evaluate)
    after(3, watch.on_step_end)
    after(7, watch.on_save)
    assert watch.seconds == 5
    after(11, watch.on_step_end)  # lost: the run stops before it is saved

    again = Stopwatch(tmp_path)
    after(1000, again.on_train_begin)
    after(4, again.on_step_end)
    assert again.seconds == 9


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "results.json", {"AP": 0.5})
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"AP": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"AP": 0.5}


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


@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 4, "augmentation": "none"}],
    ids=["after an epoch", "within an epoch"],
)
def test_interrupted_run_ends_as_the_uninterrupted_one(shapes, tmp_path, monkeypatch, options):
    """Stopped in step 3 after the checkpoint of step 2: data order, dropout, optimizer and rate go on, and the flips.

    Within an epoch flips are drawn anew: batches are fetched before Trainer sets the random state.
    """
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


def test_run_goes_on_before_a_checkpoint_that_was_cut_off(shapes, finished, tmp_path, monkeypatch, caplog):
    """Killed while it saved step 4: from step 2, and the broken checkpoint is written anew."""
    output = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(TrainerState, "save_to_json", _fail_at_step(4, TrainerState.save_to_json))
        with pytest.raises(Interruption):
            train_detector(*arguments(shapes, output))
    assert (output / "checkpoint-4").is_dir() and last_complete_checkpoint(output) == str(output / "checkpoint-2")
    train_detector(*arguments(shapes, output))
    assert "checkpoint-4 is incomplete" in caplog.text
    assert_same_weights(output, finished[0])


def _fail_at_step(step: int, original):
    def save_to_json(self, path):
        if self.global_step == step:
            raise Interruption
        original(self, path)

    return save_to_json


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


def test_call_that_fails_on_its_arguments_leaves_the_folder_free(shapes, tmp_path):
    """The call with the mistake put right is not taken for another run."""
    output = tmp_path / "run"
    with pytest.raises(DatasetError):
        train_detector(*arguments(tmp_path / "no_data", output))
    with pytest.raises(DetectorLoadError, match="teacher"):
        train_detector(*arguments(shapes, output, teacher=tmp_path / "no_teacher"))
    assert not output.exists() or not list(output.iterdir())
    assert train_detector(*arguments(shapes, output, max_steps=1, save_strategy="no"))["steps"] == 1


def test_teacher_is_looked_for_before_the_data_is_read(tmp_path):
    """A slip in its name costs seconds, not the reading of a large data set and retries on the Hub."""
    with pytest.raises(DetectorLoadError, match="teacher .*no such folder"):
        train_detector(*arguments(tmp_path / "no_data", tmp_path / "run", teacher=tmp_path / "no_teacher"))


def test_configuration_is_written_whole_or_not_at_all(shapes, finished, tmp_path, monkeypatch):
    """A run that goes on writes it again: cut off there, the folder must not be taken for another run's."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    (output / "results.json").unlink()
    before = (output / "run.yaml").read_text()
    original = Path.write_text

    def write_text(self, text, **options):
        original(self, text[: len(text) // 2], **options)
        raise Interruption

    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(Path, "write_text", write_text)
        train_detector(*arguments(shapes, output))
    assert (output / "run.yaml").read_text() == before


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
