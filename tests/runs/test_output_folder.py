"""Whose an output folder is, and where its run goes on; the rest is in tests/cli/test_training_run.py."""

from types import SimpleNamespace

import pytest

from d3etr_hf.errors import CheckpointError, OutputFolderError
from d3etr_hf.runs.output_folder import check_output_folder, checkpoint_to_go_on_from, describe_launch
from d3etr_hf.training.checkpoints import seal
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.training.test_checkpoints import change, write_checkpoint


@pytest.mark.parametrize(
    ("files", "free"),
    [({"inputs.json"}, True), (set(), False), ({"results.json"}, False), ({"results.json", "inputs.json"}, False)],
)
def test_data_at_another_place_is_the_same_only_where_its_content_is_compared(tmp_path, files, free):
    """That happens when the run goes on; a run that is finished, or of an earlier version, compares nothing."""
    write_checkpoint(tmp_path / "checkpoint-1")
    for name in files:
        (tmp_path / name).write_text("{}")
    (tmp_path / "run.yaml").write_text("data_folder: here\nteacher: one\nunlabeled_images: photos\n")
    check_output_folder(tmp_path, "data_folder: here\nteacher: one\nunlabeled_images: photos\n", {})
    if free:
        check_output_folder(tmp_path, "data_folder: there\nteacher: one\nunlabeled_images: copies\n", {})
        with pytest.raises(OutputFolderError, match="differs in teacher"):
            check_output_folder(tmp_path, "data_folder: there\nunlabeled_images: photos\n", {})
        return
    with pytest.raises(
        OutputFolderError, match=r"differs in data_folder \('here' there, 'there' here\), unlabeled_images"
    ):
        check_output_folder(tmp_path, "data_folder: there\nteacher: one\nunlabeled_images: copies\n", {})


def test_a_best_checkpoint_that_is_damaged_is_told_before_the_run_goes_on(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-2"
    (newest / "trainer_state.json").write_text(f'{{"best_model_checkpoint": "{tmp_path / "checkpoint-1"}"}}')
    seal(newest)
    change(tmp_path / "checkpoint-1" / "model.safetensors")
    for asked in (None, str(newest)):
        options = SimpleNamespace(resume_from_checkpoint=asked, load_best_model_at_end=False)
        assert checkpoint_to_go_on_from(tmp_path, options) == str(newest)
        options.load_best_model_at_end = True
        with pytest.raises(CheckpointError, match="checkpoint-1, the best until then"):
            checkpoint_to_go_on_from(tmp_path, options)


def test_a_checkpoint_that_a_kill_left_aside_is_of_a_run_too(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1.before")
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    with pytest.raises(OutputFolderError, match="differs in seed"):
        check_output_folder(tmp_path, "seed: 2\n", {})


def test_the_launch_is_described_by_what_it_is(tmp_path):
    options = D3etrTrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    assert describe_launch(options) == {"processes": 1, "mixed_precision": "bf16"}
