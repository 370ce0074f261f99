"""Slices, a part held out, and which split is evaluated on."""

from functools import partial

import pytest

from d3etr_hf.data import DetectionDataset, load_coco_split
from d3etr_hf.data.splits import Source, choose_splits, hold_out
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import annotation, coco, write_split

CATEGORIES = coco()["categories"]


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    """Ten images, 1 to 10, each with a box."""
    images = [{"id": index, "file_name": f"{index}.png", "width": 40, "height": 30} for index in range(1, 11)]
    content = coco(images=images, annotations=[annotation(index, [0, 0, 5, 5], index) for index in range(1, 11)])
    return load_coco_split(*write_split(tmp_path_factory.mktemp("ten"), content))


def source_of(ten: DetectionDataset, *splits: str) -> Source:
    return Source("ten", dict.fromkeys(splits, partial(DetectionDataset.with_transform, ten, None)))


def ids(dataset: DetectionDataset) -> list[int]:
    assert {each["id"] for each in dataset.ground_truth["images"]} == set(dataset.rows["image_id"])
    return list(dataset.rows["image_id"])


def test_slices(ten: DetectionDataset) -> None:
    """By share and by number, from both ends, of one split that is read once."""
    read = []
    source = Source("ten", {"train": lambda: read.append(1) or ten})
    for train, val, first, second in [
        ("train[:80%]", "train[80%:]", [*range(1, 9)], [9, 10]),
        ("train[2:]", "train[:2]", [*range(3, 11)], [1, 2]),
        ("train[-3:]", "train", [8, 9, 10], [*range(1, 11)]),
    ]:
        read.clear()
        chosen = choose_splits(source, train, val, None, 0)
        assert [ids(split) for split in chosen] == [first, second] and read == [1]
        assert chosen[0].name.endswith(train.removeprefix("train"))
    for wrong, message in [
        ("train[:x]", r"'train\[:x\]' is no slice"),
        ("train[", "is no slice"),
        ("train[:0%]", "holds none of the 10 images"),
        ("trian[:5]", "no split `trian`: choose one of train"),
    ]:
        with pytest.raises(DatasetError, match=message):
            choose_splits(source, wrong, "train", None, 0)


def test_a_part_held_out_is_a_partition_that_the_seed_decides(ten: DetectionDataset) -> None:
    train, val = hold_out(ten, 0.3, 0)
    assert sorted(ids(train) + ids(val)) == [*range(1, 11)] and len(val) == 3
    assert ids(train) == sorted(ids(train)) and ids(val) == sorted(ids(val))
    assert [ids(split) for split in hold_out(ten, 0.3, 0)] == [ids(train), ids(val)]
    assert len({tuple(ids(hold_out(ten, 0.3, seed)[1])) for seed in range(5)}) > 2
    assert len(hold_out(ten, 0.001, 0)[1]) == 1
    with pytest.raises(DatasetError, match="leaves none to train on"):
        hold_out(ten, 0.99, 0)


def test_which_split_is_evaluated_on(ten: DetectionDataset, caplog: pytest.LogCaptureFixture) -> None:
    for splits, said in [(("train", "valid", "test"), False), (("train", "test"), True), (("dev", "train"), False)]:
        caplog.clear()
        choose_splits(source_of(ten, *splits), "train", None, None, 0)
        assert ("the only other one, test, is taken" in caplog.text) == said
    for splits, message in [
        (("train",), "there is train alone: choose a slice by `dataset_val_split`, or .*`validation_fraction`"),
        (("train", "a", "b"), "there are a, b: choose one"),
        (("train", "trainval"), "there is train alone"),
    ]:
        with pytest.raises(DatasetError, match=message):
            choose_splits(source_of(ten, *splits), "train", None, None, 0)


def test_both_parts_together_are_not_evaluated_on_one_of_them(ten: DetectionDataset) -> None:
    """Guards a score of images that were trained on: Pascal VOC's `trainval` holds `val`."""
    read = {split: partial(DetectionDataset.with_name, ten, split) for split in ("train", "val", "trainval", "test")}
    assert choose_splits(Source("ten", read), "trainval", None, None, 0)[1].name == "test"
    assert choose_splits(Source("ten", read), "train", None, None, 0)[1].name == "val"
    del read["test"]
    with pytest.raises(DatasetError, match="no validation split; there is trainval alone"):
        choose_splits(Source("ten", read), "trainval", None, None, 0)


def test_splits_that_the_data_list_and_lack_matter_where_they_are_chosen(ten: DetectionDataset) -> None:
    source = Source("ten", source_of(ten, "train", "a").splits, {"val": "val is not there.", "test": "nor is test."})
    assert len(choose_splits(source, "train", "a", None, 0)[1]) == 10
    assert len(choose_splits(source, "train", None, 0.1, 0)[1]) == 1
    for val, message in ((None, "val is not there"), ("test", "nor is test")):
        with pytest.raises(DatasetError, match=message):
            choose_splits(source, "train", val, None, 0)
