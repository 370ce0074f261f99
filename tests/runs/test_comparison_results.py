"""The results file: a line a run, whole, once, and read back."""

import json
import logging

import pytest

from d3etr_hf.errors import ComparisonError, WriteError
from d3etr_hf.runs.comparison_results import line_of, lines_of, read_lines, record
from d3etr_hf.runs.planned_run import plan
from tests.runs.test_comparison import TRAINED, comparison

RESULTS = {"AP": 0.5, "AP50": 0.7, "AP/circle": 0.4, "parameters": 12, "steps": 3, "seconds": 1.5, "weights": "abc"}


def line(family="a", mode="alone", seed=0, ap=0.5, fingerprint="f0") -> dict:
    return {"family": family, "mode": mode, "seed": seed, "AP": ap, "parameters": 12, "fingerprint": fingerprint}


@pytest.fixture
def runs(tmp_path):
    """Teacher, alone and distilled, none of them run."""
    return plan(
        comparison(output_dir=str(tmp_path / "runs"), entries={"a": TRAINED}, modes=["alone", "distilled"], seeds=[0])
    )


def test_a_line_says_what_a_run_came_to(runs):
    distilled = runs[2]
    with pytest.raises(ComparisonError, match=f"{distilled.name}: it ended and left no .*results.json; see its log"):
        line_of(distilled)
    distilled.folder.mkdir(parents=True)
    (distilled.folder / "environment.json").write_text('{"device": "CPU", "threads": 1, "versions": {}}')
    (distilled.folder / "results.json").write_text(json.dumps(RESULTS))
    assert line_of(distilled) == {
        "family": "a",
        "mode": "distilled",
        "seed": 0,
        "teacher": "a",
        "AP": 0.5,
        "AP50": 0.7,
        "parameters": 12,
        "steps": 3,
        "seconds": 1.5,
        "device": "CPU",
        "threads": 1,
        "inputs": {},
        "fingerprint": distilled.fingerprint,
    }
    (distilled.folder / "results.json").write_text(json.dumps(RESULTS | {"processor_seconds": 1.25}))
    assert line_of(distilled)["processor_seconds"] == 1.25
    read = {"count": 1, "bytes": 3, "sizes": "5" * 64, "times": None, "content": "c" * 64}
    (distilled.folder / "inputs.json").write_text(json.dumps({"teacher": read, "training images": read}))
    assert line_of(distilled)["inputs"] == {"teacher": "c" * 12, "training images": "5" * 12}
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_AP": 0.1}, {"step": 3, "eval_AP": 0.4}]
    (distilled.folder / "log_history.json").write_text(json.dumps([*history, {"step": 3, "eval_AP": 0.5}]))
    assert line_of(distilled)["evaluations"] == [(2, 0.1), (3, 0.4)]
    # the last evaluation alone, which every run has, is no curve
    (distilled.folder / "log_history.json").write_text(json.dumps(history[:1] + history[2:]))
    assert "evaluations" not in line_of(distilled)
    (distilled.folder / "results.json").write_text('{"parameters": 12}')
    with pytest.raises(ComparisonError, match="holds no AP: the validation split has no object"):
        line_of(distilled)


def test_lines_are_added_and_a_run_has_one(tmp_path):
    """One that is run again takes the place of its line; other options are another run."""
    path = tmp_path / "new" / "results.jsonl"
    assert read_lines(path) == []
    lines = [line(), line(seed=1), line(mode="distilled"), line(fingerprint="f1")]
    for each in lines:
        record(path, each)
    assert read_lines(path) == lines
    again = line(ap=0.6)
    record(path, again)
    assert read_lines(path) == [*lines[1:], again]


@pytest.mark.parametrize("torn", ['{"family": "b", "mo', '{"family": "b"}', "nul"])
def test_a_line_that_was_cut_off_gives_way(tmp_path, caplog, torn):
    """Killed while it was written: what comes after must not be glued to it."""
    path = tmp_path / "results.jsonl"
    record(path, line())
    with path.open("a") as file:
        file.write(torn)
    caplog.set_level(logging.WARNING)
    assert read_lines(path) == [line()]
    assert "line 2 was cut off" in caplog.text
    record(path, line(seed=1))
    caplog.clear()
    assert read_lines(path) == [line(), line(seed=1)] and not caplog.text


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path):
    """As an editor may leave it."""
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line()))
    record(path, line(seed=1))
    assert read_lines(path) == [line(), line(seed=1)]


def test_a_line_that_is_no_result_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(line())}\n{{}}\n{json.dumps(line(seed=1))}\n")
    with pytest.raises(ComparisonError, match=f"{path}: line 2 is no result of d3etr compare: remove it"):
        read_lines(path)


@pytest.mark.parametrize("content", [b"\xff\xfe{}\n", None], ids=["no text", "a folder"])
def test_results_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ComparisonError, match=f"{path}: cannot be read as results .*: move it away, or name another"):
        read_lines(path)


@pytest.mark.parametrize("wrong", [{"seed": [0]}, {"AP": "high"}, {"parameters": None}])
def test_a_line_of_no_run_is_named(tmp_path, wrong):
    """Whose key no run can have, or that tables could not show."""
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(line() | wrong)}\n")
    with pytest.raises(ComparisonError, match=f"{path}: line 1 is no result of d3etr compare: remove it"):
        read_lines(path)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(WriteError, match=f"{tmp_path / 'out'} cannot be written"):
        record(tmp_path / "out" / "results.jsonl", line())


def test_only_lines_of_the_same_options_count(runs):
    teacher, alone, distilled = runs
    lines = [
        line(mode="teacher", fingerprint=teacher.fingerprint),
        line(mode="alone", fingerprint="of other options"),
        line(mode="distilled", fingerprint=distilled.fingerprint, ap=0.1),
        line(mode="distilled", fingerprint=distilled.fingerprint, ap=0.2),
    ]
    assert lines_of(runs, lines) == {teacher.key: lines[0], distilled.key: lines[3]}
