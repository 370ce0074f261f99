"""Images are read from the folders that were named, and only if they are files."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from d3etr_hf.data.coco import load_coco_split, read_coco
from d3etr_hf.data.data_arguments import DataArguments, load_splits
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.hub_datasets import load_hub_split
from d3etr_hf.data.images import read_rgb
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import coco, write_split
from tests.data.test_hub_datasets import ROWS, row, write_parquet
from tests.tiny import small_image_processor

OUTSIDE = "1 of its images lie outside the folders that were named, the first .*--allow_images_elsewhere true"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """An image beside the data set's folder."""
    path = tmp_path / "elsewhere" / "secret.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def linked_file(data: Path, outside: Path) -> dict:
    (data / "train" / "3.png").unlink()
    (data / "train" / "3.png").symlink_to(outside)
    return coco()


def linked_folder(data: Path, outside: Path) -> dict:
    (data / "train" / "sub").symlink_to(outside.parent)
    return renamed("sub/secret.png")


def renamed(file_name: str) -> dict:
    content = coco()
    content["images"][1]["file_name"] = file_name
    return content


LEAVING = {
    "link": linked_file,
    "linked folder": linked_folder,
    "dots": lambda data, outside: renamed("../../elsewhere/secret.png"),
    "dots over a folder that is not there": lambda data, outside: renamed("sub/../../../elsewhere/secret.png"),
    "absolute": lambda data, outside: renamed(str(outside)),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())
def test_coco_images_outside_are_refused_unless_allowed(tmp_path: Path, outside: Path, leave: Callable) -> None:
    """Guards against a downloaded data set that reads any file of the machine."""
    data = tmp_path / "data"
    write_split(data, coco())
    content = leave(data, outside)
    annotations = data / "annotations" / "train.json"
    annotations.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=OUTSIDE) as caught:
        load_coco_split(annotations, data / "train")
    assert str(outside) in str(caught.value)
    if "sub/.." not in content["images"][1]["file_name"]:
        for roots in (None, [outside.parent]):
            dataset = load_coco_split(annotations, data / "train", roots=roots)
            assert dataset.read_image(1).getpixel((0, 0)) == (255, 0, 0)


def test_a_folder_that_was_named_may_be_a_link_and_links_within_it_are_followed(tmp_path: Path) -> None:
    """Guards images on another disk, and splits that are links into one folder of all images."""
    real = tmp_path / "disk" / "data"
    for split in ("train", "val"):
        write_split(real, coco(), split)
        for path in (real / split).iterdir():
            (real / "all").mkdir(exist_ok=True)
            path.rename(real / "all" / f"{split}_{path.name}")
            path.symlink_to(f"../all/{split}_{path.name}")
    (tmp_path / "link").symlink_to(real)
    train, val = load_splits(
        DataArguments(data_folder=str(tmp_path / "link")), small_image_processor("conditional_detr", 64, 64)
    )
    assert train.read_image(0).size == val.read_image(1).size == (40, 30)


def test_the_option_of_the_data_arguments(tmp_path: Path, outside: Path) -> None:
    """Guards the way out that the message names."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        write_split(data, coco(), split)
    linked_file(data, outside)
    processor = small_image_processor("conditional_detr", 64, 64)
    with pytest.raises(DatasetError, match=OUTSIDE):
        load_splits(DataArguments(data_folder=str(data)), processor)
    train, _ = load_splits(DataArguments(data_folder=str(data), allow_images_elsewhere=True), processor)
    assert train.read_image(1).getpixel((0, 0)) == (255, 0, 0)


def by_path(folder: Path, path: Path) -> Path:
    return write_parquet(folder, [row(5, ROWS[2]["objects"], image={"bytes": None, "path": str(path)})])


def test_paths_in_parquet_rows(tmp_path: Path, outside: Path) -> None:
    """Guards against a row that holds no image but names a file of the machine."""
    folder = by_path(tmp_path / "a", outside)
    with pytest.raises(DatasetError, match=OUTSIDE):
        load_hub_split(folder, "train")
    assert load_hub_split(folder, "train", allow_images_elsewhere=True).read_image(0).getpixel((0, 0)) == (255, 0, 0)
    for place in (tmp_path / "b", Path(datasets.config.HF_DATASETS_CACHE) / "downloads"):
        place.mkdir()
        Image.new("RGB", (40, 30), "blue").save(place / "1.png")
        folder = by_path(tmp_path / "b", place / "1.png")
        assert load_hub_split(folder, "train").read_image(0).getpixel((0, 0)) == (0, 0, 255)
        (place / "1.png").unlink()
        with pytest.raises(DatasetError, match="1 of its images are missing"):
            load_hub_split(folder, "train")


@pytest.fixture(autouse=True)
def time_limit() -> None:
    """A named pipe that is opened waits for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path is too long for a socket's address
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


THINGS = {
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": bind,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize(("kind", "make"), THINGS.items(), ids=THINGS.keys())
def test_what_is_no_file_is_never_opened(tmp_path: Path, kind: str, make: Callable) -> None:
    """Guards against waiting for ever at the first step, or reading /dev/zero until memory ends."""
    make(tmp_path / "thing.png")
    with pytest.raises(DatasetError, match=rf"thing\.png: the image cannot be read .*it is {kind}, not a file"):
        read_rgb(tmp_path / "thing.png", 40, 30, str(tmp_path / "thing.png"))
    with pytest.raises(DatasetError, match=rf"thing\.png: the annotations cannot be read \(it is {kind}"):
        read_coco(tmp_path / "thing.png")
    annotations, images = write_split(tmp_path / "data", coco())
    (images / "3.png").unlink()
    (tmp_path / "thing.png").rename(images / "3.png")
    with pytest.raises(DatasetError, match=r"1 of its images are folders, named pipes or devices .*3\.png"):
        load_coco_split(annotations, images, roots=None)
    with pytest.raises(DatasetError, match=rf"\(it is {kind}"):
        load_coco_split(images / "3.png", images)
    if kind != "a folder":
        folder = write_parquet(tmp_path / "parquet", ROWS[2:])
        (images / "3.png").rename(folder / "train-00001-of-00001.parquet")
        with pytest.raises(DatasetError, match=rf"train-00001-of-00001\.parquet: cannot be read \(it is {kind}"):
            load_hub_split(folder, "train")


def test_an_image_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch) -> None:
    """Guards memory against a huge image in the place of a small one."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(DatasetError, match="the image is 300×200 pixels .* say 40×30"):
        read_rgb(tmp_path / "a.png", 40, 30, "a.png")


def test_the_rows_of_a_split_stay_readable(tmp_path: Path) -> None:
    """Guards the ordinary case: files in the folder that was named."""
    dataset = load_coco_split(*write_split(tmp_path, coco()))
    assert isinstance(dataset, DetectionDataset) and dataset.read_image(0).size == (40, 30)
