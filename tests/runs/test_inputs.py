"""What a run reads is known by its content: a change is seen, a copy is the same."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest

from d3etr_hf.data import DataArguments
from d3etr_hf.data.hub_datasets import load_hub_split
from d3etr_hf.errors import DamagedFileError, OutputFolderError
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.runs import inputs
from d3etr_hf.runs.inputs import (
    InputsNow,
    annotations_of,
    check_inputs,
    checkpoint_at,
    files,
    identity_of,
    images_of,
    inputs_of,
    read_inputs,
    same,
)
from tests.data.test_hub_datasets import ROWS, png, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore:.*boxes partly outside their image clipped")


@pytest.fixture
def folder(tmp_path):
    for name, content in (("a", b"123"), ("b", b"4567")):
        (tmp_path / "first" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "first" / name).write_bytes(content)
    return tmp_path / "first"


def of(folder):
    return files(sorted(folder.iterdir()), folder)


def test_fingerprint_is_of_the_content(folder):
    found = of(folder).fingerprint()
    assert (found.count, found.bytes, found.content) == (2, 7, hashlib.sha256(b"1234567").hexdigest())


def test_a_copy_elsewhere_and_at_another_time_is_the_same(folder, tmp_path):
    before = of(folder).fingerprint()
    copied = shutil.copytree(folder, tmp_path / "second")
    os.utime(copied / "a", (1, 1))
    after = of(copied).fingerprint(before)
    assert same(before, after) and before.times != after.times


@pytest.mark.parametrize("whole", [True, False])
def test_changes_are_seen(folder, monkeypatch, whole):
    """Of large inputs, unless asked for: by names and sizes alone."""
    monkeypatch.setattr(inputs, "BYTES_HASHED_ANYWAY", 0)
    before = of(folder).fingerprint(whole=whole)
    (folder / "a").write_bytes(b"124")
    assert same(before, of(folder).fingerprint(before)) is not whole
    (folder / "a").write_bytes(b"1234")
    assert not same(before, of(folder).fingerprint(before))
    (folder / "a").write_bytes(b"123")
    (folder / "a").rename(folder / "c")
    assert not same(before, of(folder).fingerprint(before))


def test_what_has_not_been_touched_is_not_read_again(folder, monkeypatch):
    monkeypatch.setattr(inputs, "BYTES_HASHED_ANYWAY", 0)
    before = of(folder).fingerprint(whole=True)
    unreadable = replace(of(folder), read=lambda: pytest.fail("it was read"))
    assert unreadable.fingerprint(before, whole=True) == before


def test_images_in_the_data_set_itself_count_by_their_bytes(tmp_path):
    changed = [dict(row) for row in ROWS]
    changed[1]["image"] = png("blue")
    moved = [dict(row) for row in ROWS]
    moved[0]["objects"] = [dict(each, bbox=[1.0, 2, 10, 19]) for each in moved[0]["objects"]]
    splits = [
        load_hub_split(write_parquet(tmp_path / str(n), rows), "train")
        for n, rows in enumerate((ROWS, ROWS, changed, moved))
    ]
    images = [images_of(split).fingerprint() for split in splits]
    boxes = [annotations_of(split).fingerprint() for split in splits]
    assert images[0].bytes == sum(len(row["image"]["bytes"]) for row in ROWS)
    assert [same(images[0], other) for other in images[1:]] == [True, False, True]
    assert [same(boxes[0], other) for other in boxes[1:]] == [True, True, False]
    chosen = images_of(splits[0].select([2])).fingerprint()
    assert chosen.content == hashlib.sha256(ROWS[2]["image"]["bytes"]).hexdigest()


def test_an_image_that_lies_beside_the_table_counts_by_its_file(tmp_path):
    (tmp_path / "beside.png").write_bytes(ROWS[0]["image"]["bytes"])
    rows = [ROWS[1], dict(ROWS[0], image={"bytes": None, "path": str(tmp_path / "beside.png")})]
    dataset = load_hub_split(write_parquet(tmp_path / "table", rows), "train", allow_images_elsewhere=True)
    found = images_of(dataset).fingerprint()
    assert found.bytes == sum(len(row["image"]["bytes"]) for row in ROWS[:2])
    assert found.content == hashlib.sha256(b"".join(ROWS[n]["image"]["bytes"] for n in (1, 0))).hexdigest()
    assert isinstance(dataset.rows, datasets.Dataset)


def test_classes_by_other_names_are_other_annotations(tmp_path):
    """The boxes and their numbers are the same; what they mean is not."""
    names = (["aeroplane", "bicycle", "cat"], ["aeroplane", "bicycle", "dog"])
    splits = [
        load_hub_split(write_parquet(tmp_path / of[-1], ROWS, category=datasets.ClassLabel(names=of)), "train")
        for of in names
    ]
    assert not same(*(annotations_of(split).fingerprint() for split in splits))


OF_CHECKPOINT = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("name", [*OF_CHECKPOINT, *SHARDS])
def test_every_file_of_a_checkpoint_counts(tmp_path, name):
    for each in (*OF_CHECKPOINT, *SHARDS, "optimizer.pt"):
        (tmp_path / each).write_bytes(b"1234")
    before = checkpoint_at(str(tmp_path)).fingerprint()
    assert before.count == 5
    (tmp_path / name).write_bytes(b"1235")
    assert not same(before, checkpoint_at(str(tmp_path)).fingerprint(before))


def test_everything_that_is_read_is_compared(tmp_path):
    places = {"teacher": b"1", "model to start from": b"22", "backbone's weights": b"333"}
    for name, content in places.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
    teacher, model, backbone = (str(tmp_path / name) for name in places)
    options = ModelArguments(model=model)
    options.backbone_weights = backbone  # never both; here to see each
    train, val = (load_hub_split(write_parquet(tmp_path / str(n), ROWS[n:]), "train") for n in (0, 1))
    found = inputs_of(options, TeacherArguments(teacher=teacher), train, val)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in places.items()}
    for name, rows in (("training", ROWS), ("validation", ROWS[1:])):
        images = b"".join(row["image"]["bytes"] for row in rows)
        expected[f"{name} images"] = hashlib.sha256(images).hexdigest()
    for name, split in (("training", train), ("validation", val)):
        expected[f"{name} annotations"] = hashlib.sha256(split.annotations_digest.encode()).hexdigest()
    assert {name: each.fingerprint().content for name, each in found.items()} == expected
    beside = inputs_of(options, TeacherArguments(teacher=teacher), train.with_unlabeled(val, 2), val)
    expected["unlabelled images"] = expected["validation images"]
    assert {name: each.fingerprint().content for name, each in beside.items()} == expected


@pytest.mark.parametrize(
    ("name", "whole", "seen"),
    [("training images", False, False), ("training images", True, True), ("teacher", False, True)],
)
def test_images_alone_may_be_too_many_to_be_hashed(folder, tmp_path, monkeypatch, name, whole, seen):
    monkeypatch.setattr(inputs, "BYTES_HASHED_ANYWAY", 0)
    written = check_inputs({name: of(folder)}, {}, whole)
    (tmp_path / "inputs.json").write_text(json.dumps(written))
    known = read_inputs(tmp_path)
    assert check_inputs({name: of(folder)}, known, whole) == written
    (folder / "a").write_bytes(b"124")
    os.utime(folder / "a", (1, 1))
    if not seen:
        check_inputs({name: of(folder)}, known, whole)
        return
    with pytest.raises(OutputFolderError, match=rf"the {name} \(other content\); put back .*another output_dir"):
        check_inputs({name: of(folder)}, known, whole)


def test_what_is_read_no_more_or_only_now_is_a_change(folder):
    known = {"teacher": of(folder).fingerprint()}
    with pytest.raises(
        OutputFolderError, match=r"the teacher \(read before, not now\), the model \(not read before\)"
    ):
        check_inputs({"model": of(folder)}, known)
    check_inputs({"model": of(folder)}, {})


@pytest.mark.parametrize("content", ["[]", '{"teacher": 3}', '{"teacher": {"count": 1}}', "{", "[" * 100_000])
def test_damaged_fingerprints_are_refused_with_the_remedy(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(
        DamagedFileError, match="inputs.json is damaged.*: remove it, and what the run reads"
    ) as caught:
        read_inputs(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_tells_whether_two_runs_have_read_the_same(folder, tmp_path, monkeypatch):
    """Of images names and sizes, whether their content was hashed or not; of all else the content."""
    assert identity_of(tmp_path) == {}
    found = []
    for changed in (None, "same size", "other size"):
        if changed:
            (folder / "a").write_bytes(b"124" if changed == "same size" else b"1234")
        for hashed in (True, False):
            monkeypatch.setattr(inputs, "BYTES_HASHED_ANYWAY", 2**20 if hashed else 0)
            read = {name: of(folder) for name in ("training images", "teacher")}
            (tmp_path / "inputs.json").write_text(json.dumps(check_inputs(read, {})))
            found.append(identity_of(tmp_path))
    images, teachers = ([each[name] for each in found] for name in ("training images", "teacher"))
    assert len(set(images[:4])) == 1 and len(set(images)) == 2 and images[4] == images[5]
    assert len(set(teachers)) == 3 and teachers[::2] == teachers[1::2]


def test_a_large_model_is_compared_by_its_content(tmp_path, monkeypatch):
    """With what a run that is done has read, which was hashed however large it is."""
    monkeypatch.setattr(inputs, "BYTES_HASHED_ANYWAY", 0)
    splits = [SimpleNamespace(annotations_digest=digest) for digest in ("t", "v")]
    monkeypatch.setattr(inputs, "load_annotated", lambda arguments: splits)
    (tmp_path / "config.json").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    found = InputsNow().identity(ModelArguments(model=str(tmp_path)), TeacherArguments(), DataArguments("data"))
    contents = {"training annotations": b"t", "validation annotations": b"v", "model to start from": b"1"}
    assert found == {name: hashlib.sha256(content).hexdigest()[:12] for name, content in contents.items()}


def test_a_run_of_which_nobody_wrote_down_what_it_read_goes_on_with_a_warning(tmp_path, caplog):
    assert read_inputs(tmp_path) == {}
    assert "holds no inputs.json" in caplog.text
