"""What rows lack is derived; texts of objects; what cannot be read is named."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import ExifTags, Image

from d3etr_hf.data.hub_datasets import load_hub_split
from d3etr_hf.errors import DatasetError
from tests.data.formats import SCENES, write_image, write_metadata, write_text
from tests.data.test_hub_datasets import INTEGER, ROWS, rewritten, write_parquet


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    """Guards boxes on a photograph that lies in its file, which every viewer turns."""
    (tmp_path / "train").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "train" / "a.jpg", exif=exif)
    row = {"file_name": "a.jpg", "objects": {"bbox": [[1.0, 2, 20, 35]], "category": ["cat"]}}
    write_text(tmp_path / "train" / "metadata.jsonl", json.dumps(row))
    dataset = load_hub_split(tmp_path, "train")
    assert dataset.read_image(0).size == (30, 40)
    assert dataset[0]["target"]["boxes"].tolist() == [[1, 2, 21, 37]]
    assert dataset.ground_truth["images"] == [{"id": 0, "width": 30, "height": 40}]


@pytest.mark.parametrize("missing", [["image_id"], ["width"], ["height", "image_id"]])
def test_columns_of_embedded_images_are_derived(tmp_path: Path, missing: list[str]) -> None:
    folder = rewritten(
        write_parquet(tmp_path / "a", ROWS[2:], category=INTEGER), lambda rows: rows.remove_columns(missing)
    )
    dataset = load_hub_split(folder, "train")
    expected = {"image_id": 0 if "image_id" in missing else 4, "width": 40, "height": 30}
    assert {name: dataset.rows[0][name] for name in expected} == expected


def test_ids_that_are_text_are_numbered(tmp_path: Path) -> None:
    def named(rows: datasets.Dataset) -> datasets.Dataset:
        return rows.remove_columns("image_id").add_column("image_id", ["photo_4"])

    assert load_hub_split(rewritten(write_parquet(tmp_path / "a", ROWS[2:]), named), "train").rows["image_id"][:] == [
        0
    ]


def test_images_beside_texts_stay_files(tmp_path: Path) -> None:
    """Guards a worker's memory against a copy of all images, and the cache of their headers, which needs the files."""

    def as_texts(rows: datasets.Dataset) -> datasets.Dataset:
        texts = [json.dumps(each) for each in rows["objects"]]
        return rows.remove_columns("objects").add_column("objects", texts)

    folder = rewritten(write_parquet(tmp_path / "a", ROWS[2:], category=INTEGER), as_texts)
    dataset = load_hub_split(folder, "train")
    assert dataset.rows.cache_files and dataset.read_image(0).size == (40, 30)


def test_texts_that_are_no_objects(tmp_path: Path) -> None:
    for text, message in [
        ("[1, 2", "`objects` of row 0 is .*, which is no JSON"),
        ('{"bbox": [[1, 2, 3, 4]]}', r"fields \['category'\] of `objects` are missing"),
        ("3", r"fields \['bbox', 'category'\]"),
    ]:
        folder = tmp_path / str(len(text))
        write_image(folder / "train" / "a.png")
        quoted = text.replace('"', '""')
        write_text(folder / "train" / "metadata.csv", f'file_name,objects,note\na.png,"{quoted} ",x')
        with pytest.raises(DatasetError, match=message):
            load_hub_split(folder, "train")


def test_an_image_that_the_metadata_names_and_is_missing(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    (tmp_path / "train" / next(iter(SCENES))).unlink()
    with pytest.raises(DatasetError, match=next(iter(SCENES))):
        load_hub_split(tmp_path, "train")
