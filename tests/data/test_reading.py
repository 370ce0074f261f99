"""Every format gives the same boxes, classes and names; what is not there is told as what it is."""

import json
import logging
from pathlib import Path

import pytest

from d3etr_hf.data import DataArguments, DetectionDataset
from d3etr_hf.data.image_checks import check_images
from d3etr_hf.data.reading import check_places, read_splits
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import coco, write_split
from tests.data.formats import EXPECTED, SCENES, WRITERS, write_image, write_metadata, write_text


def seen(dataset: DetectionDataset) -> list[tuple[list, list]]:
    """What training sees of each image, in order of the number of its boxes."""
    found = []
    for index in range(len(dataset)):
        example = dataset[index]
        assert example["image"].size == (40, 30)
        boxes = [[round(number, 4) for number in box] for box in example["target"]["boxes"].tolist()]
        found.append((boxes, example["target"]["class_labels"].tolist()))
    return sorted(found, key=lambda pair: len(pair[0]))


@pytest.mark.parametrize("style", WRITERS)
def test_every_format_gives_the_same(style: str, tmp_path: Path) -> None:
    """Guards corners, fractions and pixels against each other, class 0, and the validation split of each."""
    folder = tmp_path / "teeth"
    WRITERS[style](folder)
    for split in read_splits(DataArguments(data_folder=str(folder))):
        assert split.class_names == ["aeroplane", "tooth brush"] and split.name.startswith("teeth/")
        assert seen(split) == EXPECTED
        truth = split.ground_truth
        assert sorted(each["name"] for each in truth["categories"]) == split.class_names
        assert sorted(each["bbox"][2] for each in truth["annotations"]) == pytest.approx([5, 10, 39.5])
        assert {each["image_id"] for each in truth["annotations"]} == set(split.rows["image_id"])


@pytest.mark.parametrize("style", ["metadata", "yolo", "voc_beside"])
def test_broken_images_are_told_at_once_whatever_the_format(style: str, tmp_path: Path) -> None:
    """Also where the size of an image is in nothing but the image; or they are left out."""
    WRITERS[style](tmp_path)
    for split in {path.parent for path in tmp_path.rglob("*.png")}:
        (split / next(iter(SCENES))).write_bytes(b"no image")
    for path in tmp_path.rglob("*.xml"):
        write_text(path, path.read_text().replace("size>", "sides>"))
    splits = read_splits(DataArguments(data_folder=str(tmp_path)))
    with pytest.raises(DatasetError, match="1 of 2 images .*1 of 2 images "):
        check_images(splits)
    assert [len(split) for split in check_images(splits, skip_broken=True)] == [1, 1]


def test_a_data_yaml_may_be_named_itself(tmp_path: Path) -> None:
    WRITERS["yolo"](tmp_path)
    train, _ = read_splits(DataArguments(data_folder=str(tmp_path / "data.yaml")))
    assert seen(train) == EXPECTED


def test_an_image_folder_as_dataset_name(tmp_path: Path) -> None:
    """The other way to name it; ids, sizes and class names are derived."""
    write_metadata(tmp_path / "teeth")
    train, val = read_splits(DataArguments(dataset_name=str(tmp_path / "teeth")))
    assert seen(train) == seen(val) == EXPECTED and sorted(train.rows["image_id"]) == [0, 1]


def test_the_only_other_split_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    WRITERS["csv"](tmp_path / "teeth")
    with caplog.at_level(logging.INFO):
        read_splits(DataArguments(data_folder=str(tmp_path / "teeth")))
    (said,) = [record.getMessage() for record in caplog.records if "no validation split" in record.getMessage()]
    assert "teeth: there is no validation split; the only other one, test, is taken" in said


def test_what_is_of_no_format_is_told_with_all_that_are_read(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "a.png")
    write_text(tmp_path / "notes.md", "")
    with pytest.raises(DatasetError) as refused:
        check_places(DataArguments(data_folder=str(tmp_path)))
    message = str(refused.value)
    for word in ("COCO", "YOLO", "Pascal VOC", "metadata.jsonl", "Parquet", "Found: 'notes.md', 'pictures/'."):
        assert word in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="Found: nothing"):
        check_places(DataArguments(data_folder=str(tmp_path / "empty")))


def test_what_is_mistyped_is_told_with_the_nearest(tmp_path: Path) -> None:
    """Guards the option's name and the nearest place in each message."""
    annotations, images = write_split(tmp_path / "bccd", coco())
    four = dict.fromkeys(("train_annotations", "val_annotations"), str(annotations))
    four |= dict.fromkeys(("train_images", "val_images"), str(images))
    check_places(DataArguments(**four))
    for given, message in [
        (
            {"data_folder": str(tmp_path / "bcdd")},
            "data_folder .*bcdd': there is no such folder; did you mean .*bccd'",
        ),
        ({"data_folder": str(annotations)}, "data_folder .*train.json' is no folder"),
        ({"data_folder": str(tmp_path / "x" / "y")}, r"data_folder .*there is no such folder\.$"),
        ({"data_folder": "a\0b"}, "data_folder .*: no folder has such a name"),
        ({"dataset_name": "./nowhere/at/all"}, "dataset_name .*there is no such folder"),
        (four | {"val_annotations": f"{annotations}n"}, "val_annotations .*no such file; did you mean .*train.json'"),
        (
            four | {"train_images": str(images.parent / "trian")},
            "train_images .*no such folder; did you mean .*train'",
        ),
    ]:
        with pytest.raises(DatasetError, match=message):
            check_places(DataArguments(**given))


def test_files_of_one_name_are_told_apart_without_a_whole_path(tmp_path: Path) -> None:
    """Guards the message about classes that differ, and that no path of the machine gets into a card."""
    for split, categories in (("train", coco()["categories"]), ("valid", [{"id": 5, "name": "cat"}])):
        kept = [each for each in coco()["annotations"] if split == "train" or each["category_id"] == 5]
        content = coco(categories=categories, annotations=kept)
        write_text(tmp_path / split / "_annotations.coco.json", json.dumps(content))
        for name in SCENES:
            write_image(tmp_path / split / name)
    given = {
        f"{option}_{part}": str(tmp_path / split / name)
        for option, split in (("train", "train"), ("val", "valid"))
        for part, name in (("annotations", "_annotations.coco.json"), ("images", "."))
    }
    with pytest.raises(DatasetError, match="in train/_annotations.coco but .* in valid/_annotations.coco:"):
        read_splits(DataArguments(**given))
    for name in ("train", "val"):
        given[f"{name}_annotations"] = str(tmp_path / "train" / "_annotations.coco.json")
        given[f"{name}_images"] = str(tmp_path / "train")
    train, val = read_splits(DataArguments(**given))
    assert str(tmp_path) not in train.name + val.name


def test_explicit_paths_without_a_validation_split(tmp_path: Path) -> None:
    annotations, images = write_split(tmp_path / "teeth", coco())
    arguments = DataArguments(
        train_annotations=str(annotations), train_images=str(images), validation_fraction=0.5, class_names=["a", "b"]
    )
    train, val = read_splits(arguments)
    assert len(train) == len(val) == 1 and train.class_names == ["a", "b"]


@pytest.mark.parametrize("option", ["data_folder", "train_annotations"])
def test_a_name_longer_than_any_file_has(option: str) -> None:
    """Guards the one clear line: Python's pathlib raises the system's error."""
    others = {"train_images": ".", "val_annotations": ".", "val_images": "."} if option != "data_folder" else {}
    with pytest.raises(DatasetError, match=f"{option} 'x+[.]{{3}}x+': there is no such"):
        check_places(DataArguments(**{option: "x" * 300}, **others))


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    WRITERS["yolo"](tmp_path)
    options = {"data_folder": str(tmp_path), "validation_fraction": 0.5}
    held = {read_splits(DataArguments(**options, validation_seed=seed))[1].rows["image_id"][0] for seed in range(5)}
    assert held == {1, 2}
