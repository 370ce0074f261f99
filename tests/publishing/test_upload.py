"""The upload, by the real huggingface_hub against tests/hub_server.py: what leaves, what stays, and every failure."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from d3etr_hf.errors import HubError, PrivacyError
from d3etr_hf.publishing import upload as hub
from d3etr_hf.publishing.upload import (
    CHECKPOINT_FILES,
    describe_upload,
    explain,
    files_to_publish,
    upload,
    upload_in_background,
)
from tests.hub_server import SIGNATURE, HubServer
from tests.tiny import padded_batch, tiny_model

# huggingface_hub hands files to httpx2 in a way that this calls outdated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_" + "aBcD" * 9
RESUME = "d3etr publish runs/student --repo_id user/student"
PUBLISHED = {
    "model.safetensors": b"\0weights" * 5_000,
    "config.json": b'{"model_type": "conditional_detr"}',
    "preprocessor_config.json": b"{}",
    "README.md": b"---\nlicense: apache-2.0\n---\n# Student\n",
    "metrics.json": b'{"AP": 0.5}',
    "training.yaml": b"max_steps: 5\n",
    "log_history.json": b"[]",
    "curves.png": b"\x89PNG\0curves",
    "model.onnx": b"\0onnx",
}
STAYING = {
    "run.yaml": b"output_dir: runs/student\n",
    "training_args.bin": b"\0pickle",
    "optimizer.pt": b"\0pickle",
    "emissions.csv": b"",
    ".env": b"PASSWORD=none\n",
    "checkpoint-5/model.safetensors": b"\0old weights",
    "checkpoint-5/config.json": b"{}",
    "checkpoint-5/optimizer.pt": b"\0pickle",
    "model-old/x-of-y.safetensors": b"\0matched by the client's wildcards",
}
SILENT = "did not answer for 0.2 seconds"
FAULT = r"the Hub has a fault \(50[03]\) that is not yours"
CUT = r"the connection to the Hub was cut"
FAILURES = [  # where, how, what the message says
    ("create", 401, r"does not accept the token, or none was given \(401\): log in with `hf auth login`, or set HF_T"),
    ("create", 403, r"the token may not write to this repository \(403\): use one with write access, or another"),
    ("create", 429, r"too many requests \(429\): wait 7 seconds"),
    ("create", 500, FAULT),
    ("create", "timeout", SILENT),
    ("create", "cut", CUT),
    ("yaml", 503, "the Hub's answer makes no sense: it has a fault"),
    ("yaml", "timeout", SILENT),
    ("preupload", 401, r"does not accept the token.*\(401\)"),
    ("preupload", 403, r"may not write.*\(403\)"),
    ("preupload", 503, FAULT),
    ("preupload", "timeout", SILENT),
    ("batch", 429, r"too many requests \(429\): wait 7 seconds"),
    ("batch", 500, FAULT),
    ("put", 403, r"may not write.*\(403\)"),
    ("put", 413, r"(model.safetensors|curves.png|model.onnx) is too large for the Hub \(413\): save the model in sma"),
    ("put", 503, FAULT),
    ("put", "timeout", SILENT),
    ("put", "cut", CUT + " while uploading (model.safetensors|curves.png|model.onnx)"),
    ("verify", 500, FAULT),
    ("commit", 401, r"does not accept the token.*\(401\)"),
    ("commit", 403, r"may not write.*\(403\)"),
    ("commit", 409, r"another commit to this repository came in between \(409\): run the command again"),
    ("commit", 412, r"another commit to this repository came in between \(412\): run the command again"),
    ("commit", 413, r"a file is too large for the Hub \(413\)"),
    ("commit", 429, r"too many requests \(429\): wait 7 seconds"),
    ("commit", 503, FAULT),
    ("commit", "timeout", SILENT),
    ("commit", "cut", CUT),
]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that the client of this process talks to, as if HF_ENDPOINT, HF_TOKEN, HF_HUB_DISABLE_XET were set."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # reading certificates would take most of a test's time, and none is needed
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have slept between its tries, in order."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run: what is to be published, beside what is not."""
    return write_files(tmp_path / "runs" / "student", PUBLISHED | STAYING)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(server: HubServer) -> dict[str, bytes]:
    return server.files("user/student")


def refused_upload(run: Path, **options) -> str:
    """The message of an upload that fails."""
    with pytest.raises(HubError) as raised:
        upload(run, "user/student", RESUME, **options)
    shown = "".join(traceback.format_exception(raised.value))
    assert TOKEN not in shown
    # but where the cause itself shows the token
    assert "the above exception was the direct cause" in shown.lower() or "token hold" in shown
    return str(raised.value)


def check_message(message: str, run: Path, cause: str) -> None:
    """In this order: the cause, where everything is kept, the command on a line of its own; and no secret."""
    first, second, *rest = message.splitlines()
    assert re.search(cause, first), first
    assert first.startswith("user/student was not uploaded: ")
    assert second == f"Everything is kept in {run}. To resume the upload, run"
    assert rest == [f"  {RESUME}"]
    assert TOKEN not in message and SIGNATURE not in message


# What leaves


def test_only_the_allow_list_arrives_byte_by_byte(server, run):
    before = read_files(run)
    url = upload(run, "user/student", RESUME)
    assert published(server) == PUBLISHED
    assert url == f"{server.endpoint}/user/student/commit/{server.repositories['user/student'].commits[-1]}"
    assert read_files(run) == before
    pushed = b"".join(request.path.encode() + request.body for request in server.requests)
    for name in ("pickle", "run.yaml", "PASSWORD", "optimizer", "checkpoint-5", "emissions", "old"):
        assert name.encode() not in pushed


@pytest.mark.parametrize(("private", "arrives"), [(True, True), (False, False), (None, False)])
def test_private_is_honoured(server, run, private, arrives):
    upload(run, "user/student", RESUME, private=private)
    assert server.repositories["user/student"].private == arrives
    assert ("visibility" in json.loads(server.sent("create")[0].body)) == (private is not None)


def test_private_refuses_a_repository_that_is_public(server, run):
    """The Hub ignores the wish for a repository that exists: the model would be public."""
    upload(run, "user/student", RESUME)
    sent = len(server.sent("commit"))
    (run / "metrics.json").write_text("{}")
    check_message(refused_upload(run, private=True), run, "it is public, which no upload changes: make it private")
    assert len(server.sent("commit")) == sent


def test_unchanged_folder_is_not_sent_again(server, run):
    """And of a changed one, only what changed."""
    first = upload(run, "user/student", RESUME)
    assert upload(run, "user/student", RESUME) == first
    assert len(server.sent("put")) == 3 and len(server.sent("commit")) == 1
    (run / "metrics.json").write_text('{"AP": 0.6}')
    assert upload(run, "user/student", RESUME) != first
    assert len(server.sent("put")) == 3
    header, *files = map(json.loads, server.sent("commit")[1].body.splitlines())
    assert [line["value"]["path"] for line in files] == ["metrics.json"]


def test_sharded_model_arrives(server, run):
    shards = {f"model-0000{i}-of-00002.safetensors": b"\0shard" + bytes([i]) for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    (run / "model.safetensors").unlink()
    write_files(run, shards | {"model.safetensors.index.json": index})
    upload(run, "user/student", RESUME)
    assert {name for name in published(server) if name.startswith("model")} == {
        *shards,
        "model.safetensors.index.json",
        "model.onnx",
    }
    (run / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HubError, match="has no model-00002-of-00002.safetensors"):
        files_to_publish(run)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_incomplete_folder_is_refused_by_name(run, name):
    (run / name).unlink()
    with pytest.raises(HubError, match=rf"{run} has no {name}, so nobody could load it: name the folder of a fin"):
        files_to_publish(run)


def test_absent_folder_is_refused(tmp_path):
    with pytest.raises(HubError, match="has no config.json"):
        files_to_publish(tmp_path / "absent")


def test_secret_stops_everything_before_the_first_request(server, run):
    (run / "log_history.json").write_text(json.dumps([{"note": TOKEN}]))
    with pytest.raises(PrivacyError, match="log_history.json"):
        upload(run, "user/student", RESUME)
    assert not server.requests


def test_dry_run_lists_every_file_and_sends_nothing(server, run):
    lines = describe_upload(run, "user/student").splitlines()
    assert lines[0] == f"To {server.endpoint}/user/student would go, from {run}:"
    assert [line.split()[0] for line in lines[1:-2]] == sorted(PUBLISHED)
    assert f"  {'model.safetensors':32}    40.0kB" in lines
    assert lines[-2] == "9 files, 40.1kB"
    assert lines[-1] == (
        "Here would stay: .env, checkpoint-5/, emissions.csv, model-old/, optimizer.pt, run.yaml, training_args.bin"
    )
    assert not server.requests


def test_stranger_loads_the_published_model(server, tmp_path):
    """A fresh process that has only Transformers gives the same logits."""
    model, batch = tiny_model(), padded_batch()
    model.save_pretrained(tmp_path / "student")
    upload(tmp_path / "student", "user/student", RESUME)
    torch.save(batch, tmp_path / "batch.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForObjectDetection\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForObjectDetection.from_pretrained('user/student').eval()\n"
        "with torch.no_grad():\n"
        "    torch.save(model(**torch.load('batch.pt')).logits, 'logits.pt')\n"
        "assert not any(name.startswith('d3etr_hf') for name in sys.modules)\n"
    )
    hidden = {"HF_HUB_OFFLINE", "HF_TOKEN"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    with torch.no_grad():
        expected = model(**batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)


# Failures


@pytest.mark.parametrize(("where", "how", "cause"), FAILURES, ids=[f"{where}-{how}" for where, how, _ in FAILURES])
def test_failure_names_its_cause_and_the_same_call_completes(server, run, waits, where, how, cause):
    before = read_files(run)
    server.fail(where, how)
    check_message(refused_upload(run), run, cause)
    assert read_files(run) == before
    server.recover()
    upload(run, "user/student", RESUME)
    assert published(server) == PUBLISHED


def test_refused_connection_names_its_cause_and_the_same_call_completes(server, run, waits):
    server.stop()
    cause = r"the Hub cannot be reached \(.*refused.*\): is the network up, and HF_ENDPOINT right, if it is set\?"
    check_message(refused_upload(run), run, cause)
    server.start()
    upload(run, "user/student", RESUME)
    assert published(server) == PUBLISHED


@pytest.mark.parametrize(
    ("endpoint", "cause"),
    [
        ("http://no-such-host.invalid", r"the Hub cannot be reached \(.*(known|resolution|No address).*\)"),
        ("huggingface.co", r"the Hub cannot be reached \(.*http.*\): is the network up, and HF_ENDPOINT right"),
    ],
)
def test_wrong_endpoint_is_named(server, run, waits, monkeypatch, endpoint, cause):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    check_message(refused_upload(run), run, cause)


def test_offline_mode_is_named(server, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_message(refused_upload(run), run, "HF_HUB_OFFLINE is set, which forbids every connection: unset it")


def test_missing_token_and_wrong_token(server, run, monkeypatch):
    check_message(refused_upload(run, token="hf_wrong"), run, r"\(401\).*\[the Hub says: Invalid username or passw")
    monkeypatch.delenv("HF_TOKEN")
    check_message(refused_upload(run), run, r"none was given \(401\): log in with `hf auth login`, or set HF_TOKEN")


def test_token_with_a_line_break_is_not_shown(server, run):
    """The client's own message, which would be printed as the cause, shows it."""
    message = refused_upload(run, token=f"{TOKEN}\n")
    check_message(message, run, "does the token hold a blank or a line break")


def test_token_for_one_repository_is_enough(server, run):
    """It may not create any, so the Hub answers 403 to that, but it may write."""
    upload(run, "user/student", RESUME)
    (run / "metrics.json").write_text("{}")
    server.fail("create", 403)
    upload(run, "user/student", RESUME)
    assert published(server)["metrics.json"] == b"{}"


def test_bad_name_of_a_repository_is_named(server, run):
    with pytest.raises(HubError, match=r"(?s)Repo id must use alphanumeric.*'my student'.*" + re.escape(RESUME)):
        upload(run, "my student", RESUME)
    assert not server.requests


def test_absent_branch_is_named(server, run):
    check_message(refused_upload(run, revision="dev"), run, r"no such repository, or branch of it.*\(404\)")


def test_card_that_is_no_yaml_is_named(server, run):
    (run / "README.md").write_text("---\nlicense: [\n---\n")
    check_message(refused_upload(run), run, "Invalid metadata in README.md. - not valid YAML")


def test_resumed_upload_does_not_send_stored_files_again(server, run):
    server.fail("commit", 503)
    refused_upload(run)
    assert len(server.sent("put")) == 3
    server.recover()
    upload(run, "user/student", RESUME)
    assert len(server.sent("put")) == 3 and published(server) == PUBLISHED


@pytest.mark.parametrize(
    ("where", "how", "times", "slept"),
    [
        ("put", 503, 2, [1, 2]),
        ("put", "cut", 1, [1]),
        ("preupload", 429, 1, [8]),  # what the Hub asks for, and one
    ],
)
def test_transient_fault_is_sat_out_by_the_client(server, run, waits, where, how, times, slept):
    """That of a commit, too, where it sends large files through Xet, which this Hub does not know."""
    server.fail(where, how, times)
    (run / "curves.png").unlink()
    (run / "model.onnx").unlink()  # one large file, so that the waits have an order
    upload(run, "user/student", RESUME)
    assert waits == slept and published(server)["model.safetensors"] == PUBLISHED["model.safetensors"]


def test_what_cannot_pass_is_not_tried_again(server, run, waits):
    server.fail("create", 403)
    refused_upload(run)
    assert len(server.sent("create")) == 1 and not waits


def test_silent_hub_is_waited_for_once(server, run, waits):
    """The client would try again five times."""
    server.fail("put", "timeout")
    (run / "curves.png").unlink()
    (run / "model.onnx").unlink()
    start = time.monotonic()
    refused_upload(run)
    assert len(server.sent("put")) == 1 and time.monotonic() - start < 3


def test_client_gets_its_patience_back(server, run):
    """Other users of huggingface_hub in this process see nothing of the timeouts; nor where the upload failed."""
    client = huggingface_hub.get_session()
    send = client.send
    upload(run, "user/student", RESUME)
    server.fail("create", 403)
    (run / "metrics.json").write_text("{}")
    server.fail("preupload", "timeout")
    refused_upload(run)
    assert huggingface_hub.get_session() is client and client.send == send
    assert client.timeout.read is None and client.timeout.connect is None


def test_xet_errors_are_explained():
    """The real Hub takes large files through Xet, whose errors are builtin ones; as raised by hf_xet 1.8."""
    error = ConnectionError("Network error: Request error: HTTP status client error (401 Unauthorized), domain: x")
    assert "does not accept the token" in explain(error)
    error = ConnectionError("Server error: Request error: HTTP status server error (503 Service Unavailable)")
    assert re.search(FAULT, explain(error))
    error = ConnectionError("Network error: error sending request for url (https://storage/x?X-Amz-Signature=secret)")
    assert re.search(CUT + r" \(Network error.*\?\*\*\*\)\)", explain(error))


# In the background


@pytest.fixture
def checkpoint(server, run) -> Path:
    """A checkpoint of a run whose repository exists, as the trainer makes it at the start."""
    huggingface_hub.HfApi().create_repo("user/student")
    return run / "checkpoint-5"


@pytest.fixture
def worker():
    """Keeps the pushes waiting until it is set."""
    go = threading.Event()
    hub._QUEUE.run_as_future(go.wait)
    yield go
    go.set()


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == hub.__name__]


def test_push_survives_the_removal_of_its_checkpoint(server, checkpoint, worker):
    """save_total_limit removes checkpoints while they are on their way."""
    future = upload_in_background(checkpoint, CHECKPOINT_FILES, "user/student", path_in_repo="last-checkpoint")
    shutil.rmtree(checkpoint)
    assert not future.done()
    worker.set()
    assert future.result(timeout=20).startswith(f"{server.endpoint}/user/student/commit/")
    assert published(server) == {
        f"last-checkpoint/{name}": STAYING[f"checkpoint-5/{name}"] for name in ("model.safetensors", "config.json")
    }
    assert not os.listdir(tempfile.gettempdir())


def test_finished_model_waits_for_the_pushes_before_it(server, run, checkpoint, worker):
    """Else an older checkpoint would overwrite it."""
    upload_in_background(checkpoint, CHECKPOINT_FILES, "user/student", commit_message="step 5")
    threading.Timer(0.1, worker.set).start()
    upload(run, "user/student", RESUME)
    assert published(server) == PUBLISHED
    headers = [json.loads(request.body.splitlines()[0])["value"]["summary"] for request in server.sent("commit")]
    assert headers == ["step 5", "Upload a model trained with d3etr_hf"]


@pytest.mark.parametrize(
    ("where", "how", "cause"),
    [("preupload", 403, "may not write"), ("put", "timeout", SILENT), ("put", "cut", CUT), ("commit", 503, FAULT)],
)
def test_failed_push_is_one_warning(server, checkpoint, waits, caplog, where, how, cause):
    """It neither stops the training nor vanishes in a future that nobody looks at; the next push is whole."""
    server.fail(where, how)
    options = {"token": TOKEN}
    assert upload_in_background(checkpoint, CHECKPOINT_FILES, "user/student", **options).result(timeout=20) is None
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{checkpoint} was not pushed to user/student: ") and re.search(cause, warning)
    assert warning.endswith("Training goes on; the next save pushes again")
    assert TOKEN not in warning and not os.listdir(tempfile.gettempdir())
    server.recover()
    assert upload_in_background(checkpoint, CHECKPOINT_FILES, "user/student", **options).result(timeout=20)
    assert len(published(server)) == 2


def test_pushed_state_names_no_path_of_this_machine(server, checkpoint):
    """`best_model_checkpoint` is absolute where the output folder is."""
    state = {"best_model_checkpoint": "/scratch/alice/runs/checkpoint-5", "global_step": 5}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    upload_in_background(checkpoint, CHECKPOINT_FILES, "user/student").result(timeout=20)
    pushed = json.loads(published(server)["trainer_state.json"])
    assert pushed == {"best_model_checkpoint": "checkpoint-5", "global_step": 5}
    assert json.loads((checkpoint / "trainer_state.json").read_text()) == state


def test_files_of_an_earlier_upload_are_removed(server, run):
    """An ONNX file of other weights must not stay; what others put there stays."""
    upload(run, "user/student", RESUME)
    server.repositories["user/student"].files["notes.txt"] = b"by hand"
    (run / "model.onnx").unlink()
    upload(run, "user/student", RESUME)
    assert "model.onnx" not in published(server) and "notes.txt" in published(server)


def test_push_of_a_secret_sends_nothing_and_warns(server, checkpoint, caplog):
    (checkpoint / "config.json").write_text(json.dumps({"note": TOKEN}))
    sent = len(server.requests)
    assert upload_in_background(checkpoint, CHECKPOINT_FILES, "user/student").result(timeout=20) is None
    (warning,) = warnings_of(caplog)
    assert f"{checkpoint / 'config.json'} holds" in warning and TOKEN not in warning
    assert len(server.requests) == sent


def test_push_of_an_absent_checkpoint_warns(server, checkpoint, caplog):
    folder = checkpoint.with_name("checkpoint-6")
    assert upload_in_background(folder, CHECKPOINT_FILES, "user/student").result(timeout=20) is None
    (warning,) = warnings_of(caplog)
    assert f"{folder} was not pushed to user/student: it holds none of model.safetensors, " in warning
