"""Files are written whole or not at all, and damaged ones are refused by name."""

import errno
import json
import os
import stat

import pytest
from safetensors import SafetensorError

from d3etr_hf.errors import DamagedFileError, WriteError
from d3etr_hf.files import copy_whole, read_json, write_errors, write_json, write_whole
from d3etr_hf.training.checkpoints import seal


class Interruption(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_the_file_as_it_was(tmp_path, monkeypatch, moment):
    """On the disk before it takes the old one's place: a machine may be switched off, too."""
    path = tmp_path / "run.yaml"
    write_whole(path, "seed: 1\n")

    def killed(*args, **options):
        raise Interruption

    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(os, moment, killed)
        write_whole(path, "seed: 2\n")
    assert path.read_text() == "seed: 1\n"
    write_whole(path, "seed: 3\n")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("run.yaml", "seed: 3\n")]


def test_content_that_is_no_json_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "results.json", {"AP": 0.5})
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"AP": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"AP": 0.5}


def test_a_full_disk_is_one_error_and_leaves_no_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"AP": 0.5})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WriteError, match=r"results.json cannot be written \(No space left on device\): free some space"
    ):
        write_json(path, {"AP": 0.6})
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]
    assert json.loads(path.read_text()) == {"AP": 0.5}


def test_copies_are_whole_too(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    copy_whole(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(range(100))
    with pytest.raises(WriteError, match="absent/b cannot be written"):
        copy_whole(tmp_path / "a", tmp_path / "absent" / "b")


def test_other_errors_are_left_alone(tmp_path):
    for error in (RuntimeError("shapes differ"), ValueError("no"), KeyError("name")):
        with pytest.raises(type(error)) as caught, write_errors(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(WriteError, match="I/O error"), write_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("content", [b"", b'{"AP": 0.', b"\0\0\0\0", b"\xff\xfe"])
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path, content):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError):
        read_json(path, "remove it")
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="results.json is damaged, since it is no JSON .*: remove it") as caught:
        read_json(path, "remove it")
    assert "\n" not in str(caught.value)


@pytest.fixture
def flushed_as_windows_does(monkeypatch):
    """There a file that was opened for reading alone cannot be flushed; which files were, in their order."""
    fcntl, fsync, flushed = pytest.importorskip("fcntl"), os.fsync, []

    def strict(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "Bad file descriptor")
            flushed.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", strict)
    return flushed


def test_what_is_flushed_was_opened_for_writing(tmp_path, flushed_as_windows_does):
    (tmp_path / "a").write_bytes(b"content")
    copy_whole(tmp_path / "a", tmp_path / "b")
    seal(tmp_path)
    assert len(flushed_as_windows_does) == 4  # the copy, and two files and a manifest
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"content"] * 2
