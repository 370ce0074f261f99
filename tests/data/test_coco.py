import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from d3etr_hf.data import coco as reader
from d3etr_hf.data.coco import load_coco_split
from d3etr_hf.data.coco_folders import find_coco_split
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import annotation, coco, write_split


def test_a_split_as_the_trainer_sees_it(tmp_path: Path) -> None:
    """Guards the whole way from files to an example: order, types, shapes."""
    annotations, images = write_split(tmp_path, coco())
    Image.new("RGB", (40, 30), (10, 20, 30)).save(images / "3.png")
    dataset = load_coco_split(annotations, images, name="teeth/train")
    assert (dataset.name, len(dataset)) == ("teeth/train", 2)
    assert dataset.id2label == {0: "aeroplane", 1: "tooth brush"}
    assert dataset.label2id == {"aeroplane": 0, "tooth brush": 1}
    assert dataset.category_ids == [5, 90]

    example = dataset[1]
    assert example["image"].getpixel((0, 0)) == (10, 20, 30)
    target = example["target"]
    assert target["image_id"] == 3
    torch.testing.assert_close(target["boxes"], torch.tensor([[1.0, 2, 11, 22], [20, 10, 25, 15]]))
    torch.testing.assert_close(target["class_labels"], torch.tensor([1, 0]))
    with_transform = dataset.with_transform(lambda image, target: (image.size, target["image_id"]))
    assert with_transform[1] == ((40, 30), 3)
    assert dataset.transform is None


def test_an_image_without_boxes_gives_empty_tensors(tmp_path: Path) -> None:
    """Guards the shapes and types that concatenation and matching need."""
    dataset = load_coco_split(*write_split(tmp_path, coco(annotations=[annotation(1, [0, 0, 5, 5])])))
    target = dataset[0]["target"]
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["class_labels"].shape == (0,) and target["class_labels"].dtype == torch.int64


def test_the_ground_truth_is_the_file(tmp_path: Path) -> None:
    """Guards evaluation against ground truth that was clipped, filled in or rid of its crowds."""
    regions = [annotation(1, [-5, 0, 10, 10]), annotation(2, [0, 0, 5, 5], iscrowd=1, segmentation={"counts": []})]
    annotations, images = write_split(tmp_path, coco(annotations=regions, info={"year": 2024}))
    with pytest.warns(UserWarning, match="clipped: 1"):
        dataset = load_coco_split(annotations, images)
    assert dataset.ground_truth == json.loads(annotations.read_text())


def test_select_restricts_rows_and_ground_truth_alike(tmp_path: Path) -> None:
    """Guards against average precision over images that were never predicted."""
    annotations, images = write_split(tmp_path, coco(info={"year": 2024}))
    dataset = load_coco_split(annotations, images)
    whole = dataset.ground_truth
    selected = dataset.select([1])
    assert [example["target"]["image_id"] for example in selected] == [3]
    assert selected.ground_truth == {
        **whole,
        "images": [whole["images"][1]],
        "annotations": [whole["annotations"][0], whole["annotations"][2]],
    }
    assert selected.select([0]).ground_truth == selected.ground_truth
    assert (len(dataset), dataset.ground_truth) == (2, whole)


def test_workers_get_the_rows_but_not_the_ground_truth(tmp_path: Path) -> None:
    """Guards against sending the parsed JSON to every data loader worker."""
    regions = [annotation(i, [1, 1, 5, 5]) for i in range(2000)]
    dataset = load_coco_split(*write_split(tmp_path, coco(annotations=regions)))
    assert len(dataset.ground_truth["annotations"]) == 2000
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    received = pickle.loads(sent)
    torch.testing.assert_close(received[1]["target"], dataset[1]["target"])
    assert received.ground_truth == dataset.ground_truth


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_load_maps_the_first_ones_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against parsing the JSON in every process, writing into the data folder, and warning only once."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    annotations, images = write_split(data, coco(annotations=[annotation(1, [-5, 0, 10, 10])]))
    before = files_below(data)
    with pytest.warns(UserWarning, match="clipped: 1") as first_warnings:
        first = load_coco_split(annotations, images, cache_dir=cache)
    monkeypatch.setattr(reader, "check_coco", lambda coco, source: pytest.fail("parsed again"))
    with pytest.warns(UserWarning) as second_warnings:
        second = load_coco_split(annotations, images, cache_dir=cache)
    assert [str(warning.message) for warning in second_warnings] == [
        str(warning.message) for warning in first_warnings
    ]
    assert second.rows.to_list() == first.rows.to_list()
    assert (second.class_names, second.category_ids) == (first.class_names, first.category_ids)
    assert second.rows.cache_files
    assert files_below(data) == before
    assert len(list(cache.glob("*.arrow"))) == 1


DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "bad header": lambda content: content[:60] + b"\xff" * 8 + content[68:],
    "bad summary": lambda content: content.replace(b'"class_names"', b'"class_names{'),
    "one other bit": lambda content: content[:-300] + bytes([content[-300] ^ 64]) + content[-299:],
    "bad offsets": lambda content: content[:-400] + b"\xff" * 200 + content[-200:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cached_file_is_made_anew(tmp_path: Path, damage: Callable) -> None:
    """Guards against a disk that was full once: nothing that the user wrote is wrong."""
    annotations, images = write_split(tmp_path, coco())
    expected = load_coco_split(annotations, images, cache_dir=tmp_path / "cache").rows.to_list()
    (kept,) = (tmp_path / "cache").glob("*.arrow")
    kept.write_bytes(damage(kept.read_bytes()))
    for _ in range(2):
        assert load_coco_split(annotations, images, cache_dir=tmp_path / "cache").rows.to_list() == expected


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Guards against a bare OSError."""
    annotations, images = write_split(tmp_path, coco())
    with pytest.raises(DatasetError, match=r"\.arrow: cannot be written .*HF_DATASETS_CACHE"):
        load_coco_split(annotations, images, cache_dir=annotations)


def test_a_changed_file_never_meets_old_rows(tmp_path: Path) -> None:
    """Guards against a stale cache even where size and modification time stay the same."""
    annotations, images = write_split(tmp_path, coco())
    before = annotations.stat()
    assert load_coco_split(annotations, images).rows[1]["boxes"][0] == [1, 2, 11, 22]
    annotations.write_text(annotations.read_text().replace("[1, 2, 10, 20]", "[3, 2, 10, 20]"))
    os.utime(annotations, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert annotations.stat().st_size == before.st_size
    assert load_coco_split(annotations, images).rows[1]["boxes"][0] == [3, 2, 13, 22]


def test_the_same_annotations_with_another_image_folder(tmp_path: Path) -> None:
    """Guards against the cache handing out the images of the other folder."""
    annotations, images = write_split(tmp_path, coco())
    load_coco_split(annotations, images)
    other = tmp_path / "other"
    other.mkdir()
    for path in images.iterdir():
        Image.new("RGB", (40, 30), "red").save(other / path.name)
    assert load_coco_split(annotations, other).read_image(0).getpixel((0, 0)) == (255, 0, 0)


def test_missing_images_are_told_at_load_even_from_the_cache(tmp_path: Path) -> None:
    """Guards against a run that dies in the middle of its first epoch."""
    images = [{"id": i, "file_name": f"sub/{i}.png", "width": 40, "height": 30} for i in range(3, 9)]
    (tmp_path / "train" / "sub").mkdir(parents=True)
    annotations, folder = write_split(tmp_path, coco(images=images))
    load_coco_split(annotations, folder)
    for i in (4, 5, 7, 8):
        (folder / "sub" / f"{i}.png").unlink()
    with pytest.raises(DatasetError, match=r"train\.json: 4 of its images are missing, .*4\.png.*5\.png.*7\.png'"):
        load_coco_split(annotations, folder)
    with pytest.raises(DatasetError, match="6 of its images are missing.*check the image folder"):
        load_coco_split(annotations, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", [None, "", 3])
def test_a_file_name_is_needed(tmp_path: Path, name: object) -> None:
    """Guards against a KeyError, or the folder itself taken for an image."""
    annotations, images = write_split(tmp_path, coco())
    content = coco()
    content["images"][1]["file_name"] = name
    annotations.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"train\.json: images\[1\] \(id 3\) has `file_name`"):
        load_coco_split(annotations, images)


def test_names_with_dots_are_allowed(tmp_path: Path) -> None:
    """Guards against refusing ordinary names."""
    content = coco()
    content["images"][1]["file_name"] = "a..b.png"
    dataset = load_coco_split(*write_split(tmp_path, content))
    assert dataset.read_image(1).size == (40, 30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', r"train\.json: not a JSON file .*char 12"),
        (b"", r"train\.json: not a JSON file"),
        (b"[" * 100_000, r"train\.json: lists or objects are nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", r"train\.json: not a JSON file .*digits"),
        (b"\xff\xfe\x00\xd8", r"train\.json: not a JSON file"),
        (b'{"images": [], "annotations": []}', r"train\.json: the list `categories` is missing"),
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    """Guards against JSON and Unicode errors that do not name the file."""
    annotations, images = write_split(tmp_path, coco())
    annotations.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_coco_split(annotations, images)


def test_a_missing_annotation_file(tmp_path: Path) -> None:
    """Guards against a bare FileNotFoundError."""
    with pytest.raises(DatasetError, match=r"nowhere\.json: the annotations cannot be read"):
        load_coco_split(tmp_path / "nowhere.json", tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    """Guards files saved by Windows tools."""
    annotations, images = write_split(tmp_path, coco())
    annotations.write_bytes(b"\xef\xbb\xbf" + annotations.read_bytes())
    assert len(load_coco_split(annotations, images)) == 2


def test_a_truncated_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Guards the message that tells which of a hundred thousand images is broken."""
    annotations, images = write_split(tmp_path, coco())
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    dataset = load_coco_split(annotations, images)
    with pytest.raises(DatasetError, match=r"train.3\.png: the image cannot be read"):
        dataset[1]


@pytest.mark.parametrize(
    ("json_name", "folder", "found"),
    [
        ("train.json", "train", "train"),
        ("train.json", "images/train", "images/train"),
        ("train.json", "images", "images"),
        ("instances_train2017.json", "train2017", "train2017"),
        ("instances_train2017.json", "images/train2017", "images/train2017"),
        ("instances_train2017.json", "images", "images"),
    ],
)
def test_layouts_that_are_found(tmp_path: Path, json_name: str, folder: str, found: str) -> None:
    """Guards the folder layouts that the documentation promises."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / json_name).write_text("{}")
    (tmp_path / folder).mkdir(parents=True)
    assert find_coco_split(tmp_path, "train") == (tmp_path / "annotations" / json_name, tmp_path / found)


def test_what_is_not_found_is_listed(tmp_path: Path) -> None:
    """Guards the message that tells a user how to lay out a folder."""
    with pytest.raises(
        DatasetError,
        match=r"val\.json, .*instances_val2017\.json, .*val/_annotations\.coco",
    ):
        find_coco_split(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "val.json").write_text("{}")
    with pytest.raises(DatasetError, match="none of the image folders val, images/val, images"):
        find_coco_split(tmp_path, "val")


@pytest.mark.parametrize(
    ("name", "split", "images", "boxes"),
    [
        ("bccd", "train", 205, 2804),
        ("bccd", "val", 87, 1137),
        ("coco_mini", "train", 128, 929),
        ("coco_mini", "val", 128, 898),
    ],
)
def test_real_data_against_pycocotools(shared_data: Path, name: str, split: str, images: int, boxes: int) -> None:
    """Guards real files: every image reads at its annotated size, and every box is the one that pycocotools knows."""
    annotations, folder = find_coco_split(shared_data / name, split)
    dataset = load_coco_split(annotations, folder, name=f"{name}/{split}")
    reference = COCO(annotations)
    assert len(dataset) == images
    assert sum(map(len, dataset.rows["boxes"])) == boxes
    for index in range(len(dataset)):
        target = dataset[index]["target"]
        regions = reference.loadAnns(reference.getAnnIds(imgIds=[target["image_id"]], iscrowd=False))
        expected = np.array([region["bbox"] for region in regions]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_allclose(target["boxes"], expected, atol=0.05)
        names = [reference.cats[region["category_id"]]["name"] for region in regions]
        assert [dataset.id2label[label] for label in target["class_labels"].tolist()] == names
