"""No token and no path of this machine leaves it."""

import pytest

from d3etr_hf.errors import PrivacyError
from d3etr_hf.publishing import privacy
from d3etr_hf.publishing.privacy import REMOVED, absolute_paths_in, anonymise, anonymise_configuration, refuse_secrets

TOKEN = "hf_" + "Abcdefghij" * 3 + "KLMN"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A home, a working directory, a host's name and a secret that the tests know."""
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "alice"))
    monkeypatch.setenv("SERVICE_API_KEY", "correct-horse-battery")
    monkeypatch.setattr(privacy.socket, "gethostname", lambda: "gpu-node-17")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("runs/teacher", "runs/teacher"),
        ("user/student", "user/student"),
        ("/home/alice/data/bccd", "bccd"),
        ("/home/alice/data/bccd/", "bccd"),
        ("~/data/bccd", "bccd"),
        ("../shared/data/bccd", "bccd"),
        ("C:\\Users\\alice\\bccd", "bccd"),
        ("\\\\server\\share\\bccd", "bccd"),
        ("./../../alice/data", "data"),
        ("runs/../../../home/alice/x", "x"),
        ("file:///home/alice/x", "x"),
        ("data:/scratch/alice/coco", "coco"),
        ("-I /scratch/alice/coco", "coco"),
        ("with correct-horse-battery inside", REMOVED),
        (f"run {TOKEN}", REMOVED),
        ("on gpu-node-17", REMOVED),
        ("a/b: c", "a/b: c"),
        (1e-3, 1e-3),
        (None, None),
        (True, True),
    ],
)
def test_values(value, published):
    assert anonymise(value) == published


def test_paths_of_home_and_work_inside_text(machine):
    assert anonymise(f"--folder={machine}/home/alice/x") == "x"


def test_configuration():
    """Keys that publish or are secrets go, and so do values with secrets; nested values are cleaned too."""
    configuration = {
        "teacher": "/home/alice/teacher",
        "hub_token": "abc",
        "push_to_hub": True,
        "hub_model_id": "alice/student",
        "run_name": TOKEN,
        "layer_map": None,
        "paths": ["/a/b", {"c": "/d/e"}],
    }
    published = {"teacher": "teacher", "layer_map": None, "paths": ["b", {"c": "e"}]}
    assert anonymise_configuration(configuration) == published


def test_measurements_keep_their_keys():
    """A class may be called "bus token" or "secretary"."""
    classes = {"bus token": 3, "secretary": 4, "AP/api_key": 0.5}
    assert anonymise({"classes": classes}) == {"classes": classes}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("x correct-horse-battery x", "SERVICE_API_KEY"),
        (f"x{TOKEN}x", "Hugging Face token"),
        ("gpu-node-17", "name of this machine"),
        ("{home}/data", "home directory"),
        ("/home/bob/data", "somebody's home directory"),
        ("C:\\Users\\bob\\data", "somebody's home directory"),
        ("at {work}/runs", "working directory"),
    ],
)
@pytest.mark.parametrize("padding", [b"", b"\x00\xff" * 300_000])
def test_files(machine, content, what, padding):
    """Found anywhere in a file, binary or text; the message names file and kind, never the secret."""
    text = content.format(home=machine / "home" / "alice", work=machine)
    file = machine / "file.bin"
    file.write_bytes(padding + text.encode() + padding)
    clean = machine / "clean.txt"
    clean.write_text("runs/home/alice, hf_short, gpu-node-170")
    empty = machine / "empty"
    empty.touch()
    refuse_secrets([clean, empty])
    with pytest.raises(PrivacyError, match=what) as error:
        refuse_secrets([clean, empty, file])
    assert "file.bin" in str(error.value)
    assert not any(secret in str(error.value) for secret in ("correct-horse", TOKEN, "gpu-node"))


def test_part_of_a_longer_path_is_no_path_of_this_machine(machine, monkeypatch):
    """With /data as the working directory, `my/data/shapes` is still publishable."""
    monkeypatch.setattr(privacy.os, "getcwd", lambda: "/data")
    file = machine / "training.yaml"
    file.write_text("data_folder: my/data/shapes\nother: x/database\nsee https://hub/home/bob\n")
    refuse_secrets([file])
    file.write_text("data_folder: /data/shapes\n")
    with pytest.raises(PrivacyError, match="working directory"):
        refuse_secrets([file])


def test_paths_of_a_run():
    """Wherever they stand in its configuration; a mounted /data tells nothing of anybody."""
    configuration = {
        "data_folder": "/mnt/nas/ClientOfOurs/parts/",
        "teacher": "runs/teacher",
        "model": None,
        "dataset_name": "user/data",
        "more": [{"x": "C:\\work\\x"}, "/data", "/", 3, "~/x"],
    }
    assert absolute_paths_in(configuration) == {"/mnt/nas/ClientOfOurs/parts", "C:\\work\\x"}


def test_paths_of_a_run_are_refused_in_files(machine):
    places = {"/mnt/nas/parts", "/srv/x"}
    file = machine / "config.json"
    file.write_text('{"_name_or_path": "x/mnt/nas/parts", "other": "/mnt/nas/parts2", "y": "/srv"}')
    refuse_secrets([file], places=places)
    for path in ("/mnt/nas/parts", "/mnt/nas/parts/val", "/srv/x"):
        file.write_text(f'{{"_name_or_path": "{path}"}}')
        with pytest.raises(PrivacyError, match="config.json holds a path that the run was given"):
            refuse_secrets([file], places=places)


def test_root_is_no_secret(machine, monkeypatch):
    """As the working directory of a container it is in every file."""
    monkeypatch.setattr(privacy.os, "getcwd", lambda: "/")
    file = machine / "card.md"
    file.write_text("https://huggingface.co/user/student and a / b")
    refuse_secrets([file])


def test_ordinary_words_are_no_secrets(machine, monkeypatch):
    """A machine called "student", or TOKENIZERS_PARALLELISM=false, must not keep a model from being published."""
    monkeypatch.setattr(privacy.socket, "gethostname", lambda: "student")
    for name, value in (("TOKENIZER_BACKEND", "transformers-v2"), ("APP_TOKENS", "distilled"), ("A_TOKEN", "false")):
        monkeypatch.setenv(name, value)
    file = machine / "card.md"
    file.write_text("student false distilled transformers-v2")
    refuse_secrets([file])
    assert anonymise("student false") == "student false"


def test_token_that_was_given_is_searched_for(machine):
    file = machine / "card.md"
    file.write_text("x my-own-token x")
    refuse_secrets([file])
    with pytest.raises(PrivacyError, match="Hugging Face token"):
        refuse_secrets([file], [None, "my-own-token"])
