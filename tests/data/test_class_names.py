"""Names of classes from an option, of data that number or misname them."""

import json
from pathlib import Path

import pytest

from d3etr_hf.data import DataArguments, DetectionDataset, load_coco_split
from d3etr_hf.data.class_names import with_names
from d3etr_hf.data.reading import read_splits
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import coco, write_split
from tests.data.formats import write_image, write_text


@pytest.fixture(scope="module")
def teeth(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return load_coco_split(*write_split(tmp_path_factory.mktemp("teeth"), coco()))


def test_all_names_and_some(teeth: DetectionDataset) -> None:
    """The classes' order stays that of their ids; the ground truth and a selection have the names, too."""
    named = with_names(teeth, ["plane", "brush"], {"plane": "airplane"})
    assert named.class_names == ["airplane", "brush"] and teeth.class_names == ["aeroplane", "tooth brush"]
    assert named.id2label == {0: "airplane", 1: "brush"}
    for split in (named, named.select([0])):
        assert {each["id"]: each["name"] for each in split.ground_truth["categories"]} == {5: "airplane", 90: "brush"}
    assert {each["name"] for each in teeth.ground_truth["categories"]} == {"aeroplane", "tooth brush"}
    swapped = with_names(teeth, None, {"aeroplane": "tooth brush", "tooth brush": "aeroplane"})
    assert swapped.class_names == ["tooth brush", "aeroplane"]


@pytest.mark.parametrize(
    ("class_names", "renamed", "message"),
    [
        (["a"], None, r"class_names are 1 names, but there are 2 categories, \['aeroplane', 'tooth brush'\]"),
        (["brush", "aeroplane"], None, "would call the class 'tooth brush' 'aeroplane', which is the name of another"),
        (None, {"areoplane": "b"}, "rename_classes names 'areoplane', which is no class; did you mean 'aeroplane'"),
        (None, {"cat": "b"}, r"no class; there are \['aeroplane', 'tooth brush'\]"),
        (None, {"aeroplane": "tooth brush"}, "2 classes are named 'tooth brush'"),
    ],
)
def test_names_that_do_not_fit(teeth: DetectionDataset, class_names: list, renamed: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        with_names(teeth, class_names, renamed)


def test_the_same_names_in_another_order_rename_none(tmp_path: Path) -> None:
    """Guards objects against the name of another class; a slice of a split has the new labels, too."""
    for split in ("train", "val"):
        write_split(tmp_path, coco(), split)
    given = DataArguments(
        data_folder=str(tmp_path), dataset_val_split="val[1:]", class_names=["tooth brush", "aeroplane"]
    )
    train, val = read_splits(given)
    assert train.class_names == ["tooth brush", "aeroplane"] and train.category_ids == [90, 5]
    labels = dict(zip(train.rows["image_id"], train.rows["class_labels"], strict=True))
    raw = {each["id"]: each["category_id"] for each in coco()["annotations"]}
    assert [train.category_ids[label] for label in labels[3]] == [raw[11], raw[13]] == [90, 5]
    assert labels[7] == [1] and val[0]["target"]["class_labels"].tolist() == [0, 1]
    names = {each["id"]: each["name"] for each in train.ground_truth["categories"]}
    assert names == {5: "aeroplane", 90: "tooth brush"}


def numbered(folder: Path, train: list[int], validation: list[int]) -> str:
    """An image folder whose objects have numbers for classes."""
    for split, numbers in (("train", train), ("validation", validation)):
        write_image(folder / split / "a.png")
        objects = {"bbox": [[1.0, 2, 3, 4]] * len(numbers), "categories": numbers}
        write_text(folder / split / "metadata.jsonl", json.dumps({"file_name": "a.png", "objects": objects}))
    return str(folder)


def test_names_of_numbers(tmp_path: Path) -> None:
    """From 0 on, also where no object is of a class; else, as many as there are, in order."""
    for index, (train, validation, names, expected) in enumerate(
        [
            ([0, 2], [2], None, {0: "category 0", 2: "category 2"}),
            ([0, 2], [2], ["mug", "lamp", "fern"], {0: "mug", 1: "lamp", 2: "fern"}),
            ([1, 3], [2], ["mug", "lamp", "fern"], {1: "mug", 2: "lamp", 3: "fern"}),
        ]
    ):
        folder = numbered(tmp_path / str(index), train, validation)
        for split in read_splits(DataArguments(data_folder=folder, class_names=names)):
            assert dict(zip(split.category_ids, split.class_names, strict=True)) == expected
    with pytest.raises(DatasetError, match=r"3 names, but .* 2 categories \[1, 2\], and none is 0"):
        read_splits(DataArguments(data_folder=numbered(tmp_path / "8", [1], [2]), class_names=["a", "b", "c"]))
    with pytest.raises(
        DatasetError, match=r"class_names are 2 names, but the objects are of 3 categories, \[0, 2, 7\]"
    ):
        read_splits(DataArguments(data_folder=numbered(tmp_path / "7", [0, 2], [7]), class_names=["a", "b"]))


def test_names_of_texts_give_their_order(tmp_path: Path) -> None:
    """Guards a class that only validation has, and one that no object is of."""
    folder = tmp_path / "a"
    numbered(folder, ["mug"], ["fern"])
    train, val = read_splits(DataArguments(data_folder=str(folder)))
    assert train.class_names == val.class_names == ["fern", "mug"]
    train, val = read_splits(DataArguments(data_folder=str(folder), class_names=["mug", "lamp", "fern"]))
    assert val.class_names == ["mug", "lamp", "fern"] and val[0]["target"]["class_labels"].tolist() == [2]
    with pytest.raises(DatasetError, match=r"class_names lack \['fern'\], which objects are named"):
        read_splits(DataArguments(data_folder=str(folder), class_names=["mug", "lamp"]))


@pytest.mark.parametrize("option", [{"class_names": ["cat", " "]}, {"rename_classes": {"cat": ""}}])
def test_no_name_is_of_blanks(option: dict) -> None:
    with pytest.raises(ValueError, match="none of blanks"):
        DataArguments(**option)
