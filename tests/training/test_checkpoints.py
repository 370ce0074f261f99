"""A checkpoint counts when it is whole, and a run goes on from the newest that is."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CheckpointError, WriteError
from d3etr_hf.training import resumable_trainer
from d3etr_hf.training.checkpoints import (
    ASIDE,
    MANIFEST,
    checkpoint_beside,
    newest_whole_checkpoint,
    seal,
    why_not_whole,
)
from d3etr_hf.training.weight_average import WeightAverage
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of

REPOSITORY = Path(__file__).resolve().parents[2]


def write_checkpoint(folder: Path) -> Path:
    """What Trainer saves, in small, sealed."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(8.0)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({"state": torch.arange(8.0)}, folder / name)
    for name in ("config.json", "trainer_state.json"):
        (folder / name).write_text('{"global_step": 2}')
    seal(folder)
    return folder


@pytest.fixture
def output(tmp_path):
    for step in (250, 1000):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes instead of"),
    "zeros": (zero, "is not as it was saved"),
    "changed": (change, "is not as it was saved"),
    "a folder": (become_folder, "is no file"),
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_1.pth", "trainer_state.json", "config.json")


def test_the_newest_is_found_by_number(output, caplog):
    """1000 is after 250; what is no checkpoint does not count."""
    assert newest_whole_checkpoint(output) == output / "checkpoint-1000"
    assert newest_whole_checkpoint(output / "absent") is None
    assert not caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(output, caplog, file, damage):
    do, reason = DAMAGES[damage]
    do(output / "checkpoint-1000" / file)
    caplog.set_level(logging.WARNING)
    assert newest_whole_checkpoint(output) == output / "checkpoint-250"
    (record,) = caplog.records
    text = record.getMessage()
    assert f"{output / 'checkpoint-1000'} is not whole: its {file} " in text and reason in text
    assert f"goes on from {output / 'checkpoint-250'}" in text


@pytest.mark.parametrize(
    "content", [None, "", "[]", "[" * 100_000, '{"files": {"config.json": 3}}', '{"files": {"config.json":']
)
def test_without_its_manifest_it_is_passed_over(output, content):
    (output / "checkpoint-1000" / MANIFEST).unlink()
    if content is not None:
        (output / "checkpoint-1000" / MANIFEST).write_text(content)
    assert newest_whole_checkpoint(output) == output / "checkpoint-250"


@pytest.mark.parametrize(
    "pattern",
    ["config.json", "model*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json"],
)
def test_a_checkpoint_that_lists_no_optimizer_or_the_like_is_none(output, pattern):
    """As with save_only_model, which a fresh optimizer would go on from in silence."""
    for path in (output / "checkpoint-1000").glob(pattern):
        path.unlink()
    seal(output / "checkpoint-1000")
    assert why_not_whole(output / "checkpoint-1000") == f"it holds no {pattern}"


def test_what_a_kill_left_put_aside_comes_back(output):
    """While a step was saved once more, and that was its only checkpoint."""
    folder = output / "checkpoint-1000"
    folder.rename(output / f"checkpoint-1000{ASIDE}")
    folder.mkdir()
    (folder / "config.json").write_text("{")
    assert newest_whole_checkpoint(output) == folder and why_not_whole(folder) is None
    assert not (output / f"checkpoint-1000{ASIDE}").exists()
    # killed when the second was whole already
    (output / f"checkpoint-250{ASIDE}").mkdir()
    assert newest_whole_checkpoint(output) == folder and why_not_whole(output / "checkpoint-250") is None
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-1000", "checkpoint-250", "checkpoint-best"]


def test_a_checkpoint_of_a_folder_that_was_moved_is_the_one_beside(output, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("before")
    write_checkpoint(elsewhere / "checkpoint-250")
    write_checkpoint(elsewhere / "checkpoint-3")
    beside = checkpoint_beside(output, str(elsewhere / "checkpoint-250"))
    assert beside == output / "checkpoint-250"
    assert checkpoint_beside(output, str(elsewhere / "checkpoint-3")) == elsewhere / "checkpoint-3"


def test_one_error_where_none_is_left(output):
    for step in (250, 1000):
        zero(output / f"checkpoint-{step}" / "optimizer.pt")
    (output / "checkpoint-2000").write_text("no folder")
    with pytest.raises(CheckpointError) as caught:
        newest_whole_checkpoint(output)
    text = str(caught.value)
    assert all(f"checkpoint-{step} is not whole: " in text for step in (250, 1000, 2000))
    assert "remove them to start from the beginning, or choose another output_dir" in text and "\n" not in text


def test_a_first_checkpoint_that_was_never_finished_costs_nothing(tmp_path, caplog):
    """A kill while it was saved: from the beginning, with a warning, since nothing else was ever there."""
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    (folder / MANIFEST).unlink()
    (folder / "trainer_state.json").write_text('{"global')
    caplog.set_level(logging.WARNING)
    assert newest_whole_checkpoint(tmp_path) is None
    assert "checkpoint-2 is not whole" in caplog.text and "starts from the beginning" in caplog.text


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "zeros"])
@pytest.mark.parametrize("file", FILES[:3])
def test_checkpoints_of_earlier_versions_count_if_all_of_them_can_be_read(output, damage, file):
    for step in (250, 1000):
        (output / f"checkpoint-{step}" / MANIFEST).unlink()
    assert newest_whole_checkpoint(output) == output / "checkpoint-1000"
    DAMAGES[damage][0](output / "checkpoint-1000" / file)
    assert newest_whole_checkpoint(output) == output / "checkpoint-250"


def test_its_best_checkpoint_must_be_there_where_it_is_loaded_at_the_end(output):
    """Transformers would load the last instead, and say so in a warning."""
    newest = output / "checkpoint-1000"
    (newest / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(output / "checkpoint-250")}))
    seal(newest)
    assert newest_whole_checkpoint(output, with_best=True) == newest
    change(output / "checkpoint-250" / "model.safetensors")
    assert newest_whole_checkpoint(output) == newest
    with pytest.raises(
        CheckpointError, match="checkpoint-250, the best until then, .* is not whole either: its model"
    ):
        newest_whole_checkpoint(output, with_best=True)


# whole trainings


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


SAVING = {"save_strategy": "steps", "save_steps": 1, "teacher": None}


def test_old_checkpoints_go_only_when_the_new_one_is_sealed(shapes, tmp_path, monkeypatch):
    """Killed before that, with one checkpoint to be kept, a run would have none."""
    there = []

    def killed_at_two(folder):
        there.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        if folder.name == "checkpoint-2":
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr(resumable_trainer, "seal", killed_at_two)
    trainer = shapes_trainer(shapes, tmp_path, save_total_limit=1, **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert there == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    monkeypatch.undo()
    assert trainer.args.save_total_limit == 1
    resumed = shapes_trainer(shapes, tmp_path, save_total_limit=1, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_the_best_checkpoint_stays_where_the_folder_was_moved(shapes, tmp_path):
    """Its path of before is what the trainer's state has."""
    trainer = shapes_trainer(shapes, tmp_path, save_total_limit=1, max_steps=1, **SAVING)
    trainer.train()
    trainer.state.best_model_checkpoint = "before/checkpoint-1"
    for step in (2, 3):
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


FULL = {
    "torch": (torch, RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")),
    "safetensors": (WeightAverage, OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("library", FULL)
def test_a_full_disk_leaves_the_checkpoint_before(shapes, tmp_path, monkeypatch, library):
    """Every library tells it in its own way; half a checkpoint does not stay in the way."""
    owner, error = FULL[library]
    trainer = shapes_trainer(shapes, tmp_path, ema_decay=0.9, **SAVING)
    original = owner.save

    def save(*args):
        if trainer.state.global_step == 2:
            raise error
        original(*args)

    monkeypatch.setattr(owner, "save", save)
    reason = "No space left on device" if library == "safetensors" else "a write was cut off, as on a full disk"
    with pytest.raises(WriteError, match=rf"checkpoint-2 cannot be written \({reason}\): free some space") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_second_save_of_a_step_that_fails_leaves_the_first(shapes, tmp_path, monkeypatch):
    """Once for the step and once for the epoch that ends with it, say."""
    trainer = shapes_trainer(shapes, tmp_path, save_total_limit=2, max_steps=1, **SAVING)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert torch.load(folder / "training_args.bin", weights_only=False).save_total_limit == 2
    with monkeypatch.context() as context, pytest.raises(WriteError):
        context.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        trainer._save_checkpoint(trainer.model, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    trainer._save_checkpoint(trainer.model, None)
    assert why_not_whole(folder) is None and [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-1"]


def test_a_run_that_has_taken_its_last_step_takes_no_other(shapes, tmp_path):
    """Killed after its last checkpoint, which lies within an epoch: Trainer itself goes one step too far."""
    options = SAVING | {"per_device_train_batch_size": 2, "max_steps": 3}
    shapes_trainer(shapes, tmp_path, **options).train()
    resumed = shapes_trainer(shapes, tmp_path, **options)
    steps = []
    resumed.training_step = lambda *args: steps.append(args)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and not steps


TWO_PROCESSES = """
import json, shutil, sys, time
from pathlib import Path
from d3etr_hf.training.checkpoints import MANIFEST
from tests.shapes_fixture import shapes_trainer
shapes, output = map(Path, sys.argv[1:])
options = {"teacher": None, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
trainer = shapes_trainer(shapes, output, max_steps=3, ddp_backend="gloo", **options)
save_random_state = trainer._save_rng_state
def save_late(folder):
    time.sleep(0.3 * trainer.args.process_index)
    save_random_state(folder)
trainer._save_rng_state = save_late
trainer.train()
trainer.accelerator.wait_for_everyone()
if trainer.is_world_process_zero():
    files = json.loads((output / "checkpoint-3" / MANIFEST).read_text())["files"]
    print(*sorted(name for name in files if name.startswith("rng")), flush=True)
    shutil.rmtree(output / "checkpoint-2")
    (output / "checkpoint-3" / "rng_state_1.pth").unlink()
trainer.accelerator.wait_for_everyone()
trainer.train(resume_from_checkpoint=True)
print("from", trainer._initial_global_step, "to", trainer.state.global_step, flush=True)
"""


def test_two_processes_seal_one_checkpoint_and_choose_the_same(shapes, tmp_path):
    """The manifest holds the random state of both, however slow, and both go on before the one that lacks one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(REPOSITORY)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(shapes), str(tmp_path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("from 1 to 3" in text for text in texts)
    assert "rng_state_0.pth rng_state_1.pth" in texts[0]
    assert why_not_whole(tmp_path / "checkpoint-3") is None


def test_true_and_a_path_are_refused_unless_they_are_whole(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path, **SAVING)
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no checkpoint to go on from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(
        CheckpointError, match="checkpoint-7 is no checkpoint .*: there is no such folder; name another"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    before = weights_of(trainer.model)
    trainer.train(resume_from_checkpoint=False)
    assert not torch.equal(weights_of(trainer.model), before)
