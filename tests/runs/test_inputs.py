"""What a run reads is known by its content: a change is seen, a copy is the same."""

import hashlib
import os
import shutil
from dataclasses import replace

import datasets
import pytest

from d3etr_hf.data.hub_datasets import load_hub_split
from d3etr_hf.runs import inputs
from d3etr_hf.runs.inputs import annotations_of, files, images_of, same
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
