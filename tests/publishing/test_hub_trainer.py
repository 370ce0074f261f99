"""Pushing during and after training: what arrives, what must not, and what a Hub that fails leaves behind."""

import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import PushInProgress

from d3etr_hf.cli import publish as publish_command
from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.errors import HubError, PublishError
from d3etr_hf.publishing import hub_trainer
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.publish import PublishArguments, publish, write_model_card
from d3etr_hf.visualization import run_pictures
from tests.cli.test_training_run import arguments
from tests.shapes_fixture import shapes_trainer
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = {"model.safetensors", "config.json", "preprocessor_config.json"}
CARD = {"README.md", "metrics.json", "training.yaml", "log_history.json"}
PICTURES = {"curves.png", "detections.png", "attention.png"}
OPTIONS = {"push_to_hub": True, "hub_model_id": "user/student"}

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


DRAWN_IN_EARNEST = ("test_run_with_push_to_hub", "test_secrets_reach_no_pushed_byte")


@pytest.fixture(autouse=True)
def small_pictures(request, monkeypatch):
    """Drawing takes most of the time of a push; pictures are tested where they are drawn, and in two tests here."""
    if request.function.__name__ in DRAWN_IN_EARNEST:
        return

    def draw(*arguments):
        path = next(argument for argument in arguments if isinstance(argument, Path))
        Image.new("RGB", (1, 1), f"#{len(path.stem):06d}").save(path)  # no two alike: equal files would be stored once

    for name in ("draw_training_curves", "draw_detection_grid", "draw_attention_of"):
        monkeypatch.setattr(run_pictures, name, draw)


def run_arguments(runs, output, **options) -> tuple:
    run = arguments(runs / "data", output, teacher=runs / "teacher", **OPTIONS, **options)
    return *run, CardArguments(license="mit")


def test_run_with_push_to_hub(finished_runs, hub, tmp_path):
    """Weights, card and pictures arrive; the card's figures are the run's; the run equals one that was not pushed."""
    results = train_detector(*run_arguments(finished_runs, tmp_path / "run"))
    files = hub.files("user/student")
    assert files.keys() == MODEL | CARD | PICTURES
    card = ModelCard(files["README.md"].decode())
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["AP"] == results["AP"]
    assert card.data.license == "mit" and 'model="user/student"' in card.text
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    own, plain = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished_runs / "distilled")
    )
    assert all(own[name].equal(plain[name]) for name in own)


@pytest.mark.parametrize(
    ("strategy", "folders", "commits"),
    [
        ("end", set(), 1),
        ("every_save", set(), 3),
        ("checkpoint", {"last-checkpoint"}, 5),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}, 5),
    ],
)
def test_hub_strategy(finished_runs, hub, tmp_path, strategy, folders, commits):
    """As Transformers describes them: saves at steps 2 and 4, then the end; and never a pickle."""
    options = {"hub_strategy": strategy, "hub_always_push": True, "hub_private_repo": True}
    train_detector(*run_arguments(finished_runs, tmp_path / "run", **options))
    paths = hub.files("user/student").keys()
    assert {path.split("/")[0] for path in paths if "/" in path} == folders
    assert {path for path in paths if "/" not in path} == MODEL | CARD | PICTURES
    for folder in folders:
        inside = {path.split("/")[1] for path in paths if path.startswith(folder)}
        assert inside == MODEL | {"trainer_state.json"}
    assert len(hub.sent("commit")) == commits
    assert hub.repositories["user/student"].private
    for request in hub.requests:
        assert not any(name in request.body for name in (b"optimizer.pt", b"training_args.bin", b"rng_state"))


@pytest.mark.parametrize(("always", "jobs"), [(True, 2), (False, 1)])
def test_a_save_during_an_upload_leaves_that_upload_waited_for(finished_runs, tmp_path, monkeypatch, always, jobs):
    """The push at the end waits for all that is under way: an older save that arrived later would overwrite it."""
    options = {"hub_strategy": "every_save", "hub_always_push": always}
    trainer = shapes_trainer(finished_runs / "data", tmp_path, **options)
    slow, trainer.hub_model_id = Future(), "user/student"
    trainer.push_in_progress = PushInProgress([slow])
    monkeypatch.setattr(hub_trainer, "upload_in_background", lambda *args, **kwargs: Future())
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert trainer.push_in_progress.jobs[0] is slow
    assert len(trainer.push_in_progress.jobs) == jobs


def test_hub_that_fails_at_the_end(finished_runs, hub, tmp_path, capsys):
    """Results, model and card are on disk; the message holds the command, and what it runs finishes the upload."""
    hub.fail("commit", 503)
    with pytest.raises(HubError) as error:
        train_detector(*run_arguments(finished_runs, tmp_path / "run"))
    command = f"d3etr publish {tmp_path / 'run'} --repo_id user/student --license mit"
    assert command in str(error.value)
    assert "AP 0." in capsys.readouterr().out
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept >= MODEL | CARD | PICTURES | {"results.json", "checkpoint-4"}
    assert not hub.files("user/student")
    hub.recover()
    publish(PublishArguments(str(tmp_path / "run"), "user/student"), CardArguments(license="mit"))
    assert hub.files("user/student").keys() == MODEL | CARD | PICTURES
    stored = hub.files("user/student")["model.safetensors"]
    assert stored == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert len(hub.sent("put")) == len({request.path for request in hub.sent("put")})  # no large file was sent twice


def test_hub_that_is_down_does_not_keep_a_run_from_starting(finished_runs, hub, tmp_path, caplog, monkeypatch):
    """Refused from the first step on: it trains to the end, and saves everything before it says so."""
    hub.stop()
    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "propagate", True)
    with caplog.at_level("WARNING"), pytest.raises(HubError, match="cannot be reached"):
        train_detector(*run_arguments(finished_runs, tmp_path / "run", hub_strategy="every_save"))
    assert any("could not be made on the Hub" in record.message for record in caplog.records)
    assert any("Training goes on" in record.message for record in caplog.records)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4
    hub.start()


def test_finished_run_tells_how_to_publish_it(finished_runs, hub, tmp_path, caplog, monkeypatch):
    """Called again with push_to_hub, a finished run trains nothing and names the command."""
    shutil.copytree(finished_runs / "distilled", tmp_path / "run")
    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "propagate", True)
    with caplog.at_level("WARNING"):
        train_detector(*run_arguments(finished_runs, tmp_path / "run"))
    assert any(f"d3etr publish {tmp_path / 'run'} --repo_id user/student" in r.message for r in caplog.records)


def test_push_from_python(finished_runs, hub, tmp_path):
    """`trainer.push_to_hub()` without a script: trains, pushes, and the card names no folder of this machine."""
    trainer = shapes_trainer(finished_runs / "data", tmp_path / "run", hub_model_id="user/student")
    trainer.train()
    url = trainer.push_to_hub(license="mit", compare=[f"student alone={finished_runs / 'alone'}"])
    files = hub.files("user/student")
    assert url.startswith(f"{hub.endpoint}/user/student/commit/")
    assert files.keys() == MODEL | CARD | PICTURES
    card = ModelCard(files["README.md"].decode())
    assert "student alone |" in card.text and "teacher |" in card.text
    assert str(tmp_path) not in card.content and str(finished_runs) not in card.content
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["AP"] == trainer.evaluate()["eval_AP"]


def test_push_after_another_training(finished_runs, hub, tmp_path):
    """As many steps into the same folder: the figures, and the seed, are those of the weights that are pushed."""
    for seed in (1, 2):
        options = {"hub_model_id": "user/student", "seed": seed, "learning_rate": seed * 1e-3}
        trainer = shapes_trainer(finished_runs / "data", tmp_path / "run", student=tiny_model(seed=seed), **options)
        trainer.train()
        trainer.push_to_hub(license="mit")
        card = ModelCard(hub.files("user/student")["README.md"].decode())
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert found["AR_100"] == trainer.evaluate()["eval_AR_100"]
        assert f"seed {seed}" in card.text and "The training arguments (training.yaml)" in card.text


def test_push_in_mixed_precision(finished_runs, hub, tmp_path):
    """The card measures what was saved, whatever the live model runs in."""
    trainer = shapes_trainer(finished_runs / "data", tmp_path / "run", hub_model_id="user/student", bf16=True)
    trainer.train()
    trainer.push_to_hub(license="mit")
    assert hub.files("user/student").keys() == MODEL | CARD | PICTURES


def test_publish_script(finished_runs, hub, tmp_path, monkeypatch, capsys):
    """As the README calls it; and what a failure prints is, pasted into a shell, the same call."""
    folder = shutil.copytree(finished_runs / "distilled", tmp_path / "it's a run")
    alone = f"student alone={finished_runs / 'alone'}"
    words = [str(folder), "--repo_id", "user/student", "--private", "--revision", "main", "--license", "mit"]
    words += ["--compare", alone]
    monkeypatch.setattr(sys, "argv", ["publish.py", *words, "--dry_run"])
    publish_command.main()
    assert "10 files" in capsys.readouterr().out and not hub.requests
    hub.fail("commit", 403)
    monkeypatch.setattr(sys, "argv", ["publish.py", *words])
    with pytest.raises(HubError) as error:
        publish_command.main()
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command == ["d3etr", "publish", *words]
    hub.recover()
    monkeypatch.setattr(sys, "argv", command[1:])
    publish_command.main()
    assert "/user/student/commit/" in capsys.readouterr().out
    assert hub.repositories["user/student"].private and len(hub.files("user/student")) == 10


def test_without_a_licence_nothing_is_sent(finished_runs, hub, tmp_path, monkeypatch):
    """Told before a run trains one step, from Python as by the command; what the model has had once, it keeps."""
    *run, _ = run_arguments(finished_runs, tmp_path / "run")
    with pytest.raises(PublishError, match=r"run has no licence, without .*: give one by --license, such as apache"):
        train_detector(*run)
    assert not (tmp_path / "run").exists()
    trainer = shapes_trainer(finished_runs / "data", tmp_path / "run", hub_model_id="user/student")
    with pytest.raises(PublishError, match=r"has no licence.*\(in Python license=...\)"):
        trainer.push_to_hub()
    folder = shutil.copytree(finished_runs / "distilled", tmp_path / "student")
    publication = PublishArguments(str(folder), "user/student")
    with pytest.raises(PublishError, match="has no licence"):
        publish(publication, CardArguments())
    assert not hub.requests and not (folder / "README.md").exists()
    write_model_card(folder, CardArguments(license="mit"))
    publish(publication, CardArguments())
    assert ModelCard(hub.files("user/student")["README.md"].decode()).data.license == "mit"


def test_unknown_card_argument_is_refused(finished_runs, hub, tmp_path):
    trainer = shapes_trainer(finished_runs / "data", tmp_path / "run", hub_model_id="user/student")
    with pytest.raises(TypeError, match="licence"):
        trainer.push_to_hub(licence="mit")


def test_secrets_reach_no_pushed_byte(finished_runs, hub, tmp_path, monkeypatch):
    """A token in the environment, one in the arguments, and a home directory with data and teacher in it."""
    home = tmp_path / "home" / "alice"
    shutil.copytree(finished_runs, home / "work")
    secret, argument_token = "swordfish-0123456789", TOKEN_OF_ARGUMENTS
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", secret)
    hub.token = argument_token
    options = {"hub_token": argument_token, "run_name": f"run of {secret}", "hub_strategy": "all_checkpoints"}
    train_detector(*run_arguments(home / "work", home / "runs" / "student", **options))
    assert hub.files("user/student").keys() >= MODEL | CARD | PICTURES
    assert secret in (home / "runs" / "student" / "run.yaml").read_text()  # it was there to leak
    bodies = [request.body for request in hub.requests] + [*hub.storage.values()]
    bodies += [content for repository in hub.repositories.values() for content in repository.files.values()]
    assert len(bodies) > 20
    for hidden in (secret, argument_token, str(home), "alice", str(tmp_path)):
        assert not any(hidden.encode() in body for body in bodies), hidden


TOKEN_OF_ARGUMENTS = "hf_" + "givenAsArgument" * 3


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_processes_push_once(finished_runs, hub, tmp_path):
    """By the script itself: two saves and the end are three commits, the card tells of both processes."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "distill.py"), str(finished_runs / "distilled/run.yaml")]
    command += ["--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--hub_strategy", "every_save"]
    command += [
        "--license",
        "mit",
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "user/student",
        "--hub_always_push",
        "true",
    ]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    # as torchrun starts them, without a third process that imports torch for it
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [errors[-3000:] for _, errors in outputs]
    assert "".join(printed for printed, _ in outputs).count("published: ") == 1
    files = hub.files("user/student")
    assert files.keys() == MODEL | CARD | PICTURES
    assert len(hub.sent("commit")) == 3
    training = json.loads(files["metrics.json"])["training"]
    assert training["batch"]["processes"] == 2 and training["batch_size"] == 16
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
