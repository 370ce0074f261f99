"""What is wrong with the images of both splits is told at once, before training."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3etr_hf.data.data_arguments import DataArguments, load_splits
from d3etr_hf.errors import DatasetError
from tests.data.formats import EXPECTED, write_metadata, write_voc_beside, write_yolo
from tests.data.test_hub_datasets import row, write_parquet
from tests.data.test_images import write_turned
from tests.tiny import small_image_processor

WIDTH, HEIGHT = 40, 30


def write_images(folder: Path, split: str, count: int, first: int = 1) -> dict:
    """Noise, each image another one, and its annotations."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    images, regions = [], []
    for number in range(first, first + count):
        pixels = np.random.default_rng([len(split), number]).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        regions.append({"id": number, "image_id": number, "category_id": 1, "bbox": [number, 2, 10, 9]})
    return {"images": images, "annotations": regions, "categories": [{"id": 1, "name": "mug"}]}


def write_annotations(folder: Path, split: str, content: dict) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six sound training images and three sound validation images, all different."""
    for split, count in (("train", 6), ("val", 3)):
        write_annotations(tmp_path, split, write_images(tmp_path, split, count))
    return tmp_path


def loaded(folder: Path, trains: bool = True, **options):
    return load_splits(DataArguments(data_folder=str(folder), **options), small_image_processor(), trains=trains)


def told_by(folder: Path, **options) -> list[str]:
    """The messages of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded(folder, **options)
    return [str(warning.message) for warning in caught]


def changed(folder: Path, split: str, change) -> None:
    path = folder / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def damage(folder: Path) -> None:
    """Two training images of another size, one unreadable, one validation image cut off in its middle."""
    changed(folder, "train", lambda content: [content["images"][i].update(width=60) for i in (1, 4)])
    (folder / "train" / "3.png").write_text("no image")
    path = folder / "val" / "2.png"
    path.write_bytes(path.read_bytes()[:2000])


def test_sound_images_are_passed_without_a_word(folder: Path) -> None:
    """Guards against warnings that nobody reads any more."""
    assert told_by(folder) == []


def test_all_faults_of_both_splits_are_told_at_once(folder: Path) -> None:
    """Guards against mending a data set one start at a time, and a validation image that ends a whole training."""
    damage(folder)
    with pytest.raises(DatasetError) as caught:
        loaded(folder)
    message = str(caught.value)
    train, val = (f"{folder.name}/{split}" for split in ("train", "val"))
    assert f"{train}: 2 of 6 images are of another size than annotated: {folder / 'train' / '2.png'} (the" in message
    assert "40×30 pixels (width × height), but the annotations say 60×30" in message
    assert f"{train}: 1 of 6 images are unreadable: {folder / 'train' / '3.png'} (" in message
    assert f"{val}: 1 of 3 images are unreadable: {folder / 'val' / '2.png'} (" in message
    assert message.endswith("Or pass --skip_broken_images true to leave them out.")


def test_broken_images_are_left_out_where_that_is_asked_for(folder: Path) -> None:
    """Guards against images that are evaluated as missed, and against silence."""
    damage(folder)
    with pytest.warns(UserWarning, match="Left out: .*2 of 6 images.* 1 of 6 .* 1 of 3"):
        train, val = loaded(folder, skip_broken_images=True)
    assert train.rows["image_id"][:] == [1, 4, 6] and val.rows["image_id"][:] == [1, 3]
    assert [image["id"] for image in val.ground_truth["images"]] == [1, 3]
    assert [region["image_id"] for region in val.ground_truth["annotations"]] == [1, 3]
    assert len([train[index] for index in range(3)]) == 3


def without_sizes(folder: Path) -> None:
    """Pascal VOC's files, which name no sizes."""
    write_voc_beside(folder)
    for file in folder.rglob("*.xml"):
        file.write_text(re.sub("<size>.*</size>", "", file.read_text()))


@pytest.mark.parametrize("write", [write_yolo, write_metadata, without_sizes])
def test_broken_images_whose_size_is_needed(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Guards against a refusal of the first one, before all are told, or can be left out."""
    write(tmp_path)
    folders = sorted({path.parent for path in tmp_path.rglob("7.png")})
    for folder in folders:
        (folder / "7.png").write_bytes(b"no image")
    first = str(folders[0] / "7.png")
    with pytest.raises(DatasetError, match=f"train: 1 of 2 images are unreadable: {first}.* 1 of 2 .*skip_broken"):
        loaded(tmp_path)
    with pytest.warns(UserWarning, match="Left out") as caught:
        train, val = loaded(tmp_path, skip_broken_images=True)
    assert [str(each.message)[:8] for each in caught if "unreadable" in str(each.message)] == ["Left out"]
    for split in (train, val):
        assert [sorted(each) for each in split.rows["boxes"]] == [sorted(EXPECTED[1][0])]
        assert len(split.ground_truth["images"]) == 1 and len(split.ground_truth["annotations"]) == 2


def test_another_process_goes_by_what_was_decided(folder: Path) -> None:
    """Guards processes that each look for themselves, and train on different images; and the same warning from all."""
    arguments, decided = DataArguments(data_folder=str(folder), skip_broken_images=True), []
    damage(folder)

    def deciding(find):
        decided.append(find())
        return decided[0]

    with pytest.warns(UserWarning, match="Left out"):
        load_splits(arguments, small_image_processor(), decide=deciding)
    assert decided == [[[1, 2, 4], [1]]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, val = load_splits(arguments, small_image_processor(), decide=lambda _: [[0], [2]])
    assert train.rows["image_id"][:] == [2, 3, 4, 5, 6] and val.rows["image_id"][:] == [1, 2]


def test_a_split_of_which_nothing_is_left(folder: Path) -> None:
    """Guards against an empty split, at which something else fails."""
    changed(folder, "val", lambda content: [image.update(width=60) for image in content["images"]])
    with pytest.raises(DatasetError, match="/val: no image is left that can be used"):
        loaded(folder, skip_broken_images=True)


def test_evaluation_does_not_read_training_images(folder: Path) -> None:
    """Guards against minutes of reading, and refusals for what is not used."""
    (folder / "train" / "3.png").write_text("no image")
    loaded(folder, trains=False)
    (folder / "val" / "3.png").write_text("no image")
    with pytest.raises(DatasetError, match="/val: 1 of 3"):
        loaded(folder, trains=False)


def repeat_entry(content: dict, move: int) -> None:
    """The first image once more under id 100, its box moved by so many pixels."""
    content["images"].append(content["images"][0] | {"id": 100})
    region = content["annotations"][0]
    box = [region["bbox"][0] + move, *region["bbox"][1:]]
    content["annotations"].append(region | {"id": 100, "image_id": 100, "bbox": box})


def test_one_file_under_several_ids(folder: Path) -> None:
    """Guards against the same pixels trained with two sets of boxes."""
    changed(folder, "train", lambda content: repeat_entry(content, 0))
    (told,) = told_by(folder)
    assert (
        f"1 image file is listed under several image ids, the first {folder / 'train' / '1.png'} (ids 1, 100)" in told
    )
    assert "with the same boxes" in told
    changed(folder, "train", lambda content: content["annotations"][-1].update(bbox=[5, 5, 5, 5]))
    with pytest.raises(DatasetError, match=r"1\.png \(ids 1, 100\), with different boxes: .* Give every image a file"):
        loaded(folder)


def test_images_of_both_splits(folder: Path) -> None:
    """Guards against measuring on images that were trained on: copies of another name count, names alone do not."""
    shutil.copy(folder / "train" / "5.png", folder / "val" / "2.png")
    (told,) = told_by(folder)
    val, train = folder / "val" / "2.png", folder / "train" / "5.png"
    assert f"1 of 3 images of {folder.name}/val are in {folder.name}/train as well, the first {val}" in told
    assert f"which is {train}:" in told


def test_the_same_image_with_different_boxes_in_one_split(folder: Path) -> None:
    """Guards against contradicting boxes of copies."""
    shutil.copy(folder / "train" / "5.png", folder / "train" / "2.png")
    (told,) = told_by(folder)
    assert "/train: 1 image is there several times with different boxes" in told and "2.png and " in told
    changed(folder, "train", lambda content: content["annotations"][4].update(bbox=content["annotations"][1]["bbox"]))
    assert told_by(folder) == []


def test_images_that_only_look_the_same_from_both_ends_are_different(folder: Path) -> None:
    """Guards against a false alarm: uncompressed files that begin and end alike."""
    pixels = np.full((HEIGHT * 4, WIDTH * 4, 3), 90, dtype=np.uint8)
    for number in (1, 2):
        pixels[60, 80] = number
        Image.fromarray(pixels).save(folder / "train" / f"{number}.png", format="bmp")
    changed(folder, "train", lambda content: [content["images"][i].update(width=160, height=120) for i in range(2)])
    assert told_by(folder) == []


def test_orientations_that_the_annotations_ignore_are_told(folder: Path) -> None:
    """Guards against a detector that sees turned images in use, and lay ones in training."""
    write_turned(folder / "train" / "4.png", np.asarray(Image.open(folder / "train" / "4.png")), 6)
    (told,) = told_by(folder)
    assert "1 of 6 images are annotated as they are stored" in told and str(folder / "train" / "4.png") in told


def test_hub_data(tmp_path: Path) -> None:
    """Guards the other way in: both splits at once, and the same image in both."""
    objects = [{"bbox": [1.0, 2, 10, 20], "category": 0}]
    fields = ("bbox", "category")
    folder = write_parquet(tmp_path / "hub", [row(1, objects), row(2, objects, width=310)], fields=fields)
    write_parquet(folder, [row(1, objects), row(2, objects, height=5)], "validation", fields=fields)
    with pytest.raises(DatasetError, match="hub/train: 1 of 2 images are of another .*hub/validation: 1 of 2 images"):
        load_splits(DataArguments(dataset_name=str(folder)), small_image_processor())
    given = DataArguments(dataset_name=str(folder), skip_broken_images=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, val = load_splits(given, small_image_processor())
    assert (len(train), len(val)) == (1, 1)
    assert any("1 of 2 images of" in str(warning.message) for warning in caught)
