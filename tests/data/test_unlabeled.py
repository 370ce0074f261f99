"""A folder of images without labels: what of it is taken, left out, warned of and refused."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3etr_hf.data import unlabeled
from d3etr_hf.data.data_arguments import DataArguments, load_splits
from d3etr_hf.data.image_headers import read_headers
from d3etr_hf.data.sampling import TrainingSample
from d3etr_hf.data.strong_augmentation import Mosaic
from d3etr_hf.errors import DatasetError
from tests.data.test_image_checks import folder  # noqa: F401
from tests.tiny import small_image_processor


def draw(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images in two folders, beside what is none of them."""
    for name in ("a.png", "deeper/b.jpg", "deeper/still/c.webp", ".hidden/d.png"):
        draw(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def loaded(folder: Path, photos: Path, **options):  # noqa: F811
    """The training split, and the messages of all warnings."""
    arguments = DataArguments(str(folder), unlabeled_images=str(photos), augmentation="none", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, _ = load_splits(arguments, small_image_processor())
    return train, [str(warning.message) for warning in caught]


def names_of(train) -> list[str]:
    return [os.path.basename(path) for path in train.unlabeled.images.rows["image_path"]]


def test_images_of_all_folders_are_taken_and_stand_beside_the_labelled_ones(folder, photos):  # noqa: F811
    train, told = loaded(folder, photos, unlabeled_ratio=0.5)
    assert names_of(train) == ["a.png", "b.jpg", "c.webp"] and told == []
    assert (len(train), train.images_of_epoch, train.trained_images) == (6, 9, 9)
    ids = train.unlabeled.images.rows["image_id"][:]
    assert ids == [-1, -2, -3] and not {*ids} & {*train.rows["image_id"]}
    example = train[TrainingSample(7, seed=1, epoch=0, step=0)]
    assert example["labeled"] is False and example["labels"]["image_id"] == -2
    labeled = train[TrainingSample(5, seed=1, epoch=0, step=0)]
    assert "labeled" not in labeled and labeled["pixel_values"].shape == example["pixel_values"].shape


def test_labelled_images_are_left_out_by_name_and_by_content(folder):  # noqa: F811
    """A folder of which two images are labelled, one of them there twice, and one is another one's copy."""
    shutil.copy(folder / "train" / "2.png", folder / "train" / "copy of a labelled one.png")
    shutil.copy(folder / "train" / "4.png", folder / "train" / "copy.png")
    train, told = loaded(folder, folder / "train", max_train_images=2)
    assert names_of(train) == ["3.png", "4.png", "5.png", "6.png", "copy.png"]
    (line,) = told
    assert "train, unlabelled: 3 of 8 images are in" in line and line.endswith("5 remain without labels.")
    (folder / "train" / "copy.png").unlink()
    (folder / "train" / "copy of a labelled one.png").write_text("no image")
    message = (
        r"no image is left .* of 7 6 are in .*train, with their labels, and 1 cannot be used: name another folder"
    )
    with warnings.catch_warnings(), pytest.raises(DatasetError, match=message):
        warnings.simplefilter("error")  # one line alone
        loaded(folder, folder / "train", skip_broken_images=True)


def test_broken_images_are_left_out_beside_labelled_ones(folder):  # noqa: F811
    """Also one whose header is sound, and after the labelled ones, which are looked at no more."""
    (folder / "train" / "7.png").write_text("no image")
    sound = (folder / "train" / "6.png").read_bytes()
    (folder / "train" / "8.png").write_bytes(sound[: len(sound) // 2])
    train, told = loaded(folder, folder / "train", max_train_images=2, skip_broken_images=True)
    assert names_of(train) == ["3.png", "4.png", "5.png", "6.png"]
    assert any("2 of 8 images are in" in message and "; 4 remain without labels" in message for message in told)


def test_ids_are_below_those_of_the_training_split(folder, photos):  # noqa: F811
    """Which may be below 0, too; of an image with the same id the same would be drawn."""
    path = folder / "annotations" / "train.json"
    content = json.loads(path.read_text())
    for entry, name in [(image, "id") for image in content["images"]] + [
        (annotation, "image_id") for annotation in content["annotations"]
    ]:
        entry[name] = -entry[name]
    path.write_text(json.dumps(content))
    train, _ = loaded(folder, photos)
    assert sorted(train.rows["image_id"]) == [-6, -5, -4, -3, -2, -1]
    assert train.unlabeled.images.rows["image_id"][:] == [-7, -8, -9]


def test_one_too_narrow_to_resize_is_named_by_its_file(folder, photos):  # noqa: F811
    """It has no id that anybody gave it."""
    draw(photos / "a.png", width=5000, height=1)
    train, _ = loaded(folder, photos)
    with pytest.raises(DatasetError, match="photos/a.png: image -1 of 5000×1 pixels cannot be resized"):
        train[TrainingSample(6, seed=1, epoch=0, step=0)]


def test_they_are_augmented_as_the_labelled_ones_are(folder, photos):  # noqa: F811
    """With mosaics, too, and with a transform that is set later; an epoch has one of them at the least."""
    train, _ = loaded(folder, photos)
    train.mosaic = Mosaic(1.0, 1.0)
    joined = train.with_unlabeled(train.unlabeled.images, 1e-9)
    assert joined.unlabeled.images.mosaic is joined.mosaic and joined.images_of_epoch == 7
    plain = train.with_transform(None)
    assert plain[TrainingSample(6, seed=1, epoch=0, step=0)].keys() == {"image", "target", "sample", "labeled"}


def test_mosaics_that_are_asked_for_are_made_of_them_too(folder, photos):  # noqa: F811
    arguments = DataArguments(str(folder), unlabeled_images=str(photos), augmentation="flip", mosaic=0.5)
    train, _ = load_splits(arguments, small_image_processor())
    assert train.unlabeled.images.mosaic is train.mosaic is not None


def test_images_of_validation_are_warned_of(folder, photos):  # noqa: F811
    shutil.copy(folder / "val" / "2.png", photos / "deeper" / "z.png")
    train, (line,) = loaded(folder, photos)
    assert len(train.unlabeled.images) == 4
    assert re.match(r"1 of 3 images of .*val are in photos, unlabelled as well, the first .*2\.png, .*z\.png", line)


def test_broken_images_are_named_at_once_and_left_out_where_that_is_asked_for(folder, photos):  # noqa: F811
    (photos / "a.png").write_text("no image")
    (photos / "deeper" / "b.jpg").write_bytes((photos / "deeper" / "b.jpg").read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"2 of 3 images are unreadable: .*a\.png .*b\.jpg .*--skip_broken_images"):
        loaded(folder, photos)
    train, told = loaded(folder, photos, skip_broken_images=True)
    assert names_of(train) == ["c.webp"] and told[0].startswith("Left out: photos, unlabelled: 2 of 3 images")


def test_the_labelled_splits_are_not_decoded_once_more(folder, photos, monkeypatch):  # noqa: F811
    """`check_images` has done it, which takes long; of one image less nothing that it kept is found again."""
    asked = []

    def read(split, *, decode_all=False):
        asked.append((split.name, decode_all))
        return read_headers(split, decode_all=decode_all)

    monkeypatch.setattr(unlabeled, "read_headers", read)
    loaded(folder, photos, skip_broken_images=True)
    assert [name for name, decode_all in asked if decode_all] == ["photos, unlabelled"] and len(asked) == 3


def test_links_that_lead_elsewhere_are_refused(folder, photos, tmp_path):  # noqa: F811
    draw(tmp_path / "elsewhere" / "x.png")
    (photos / "y.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    with pytest.raises(DatasetError, match=r"unlabeled_images .*photos'?: 1 of its images lie outside .*y\.png"):
        loaded(folder, photos)
    train, _ = loaded(folder, photos, allow_images_elsewhere=True)
    assert len(train.unlabeled.images) == 4


def test_a_folder_without_images_and_none_at_all(folder, photos, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="unlabeled_images .*empty.*: there is no image in this folder"):
        loaded(folder, tmp_path / "empty")
    with pytest.raises(DatasetError, match="unlabeled_images .*phtos.*: there is no such folder.*photos"):
        loaded(folder, tmp_path / "phtos")


def test_names_that_are_no_text_are_refused(folder, photos):  # noqa: F811
    try:
        os.rename(photos / "a.png", os.fsencode(photos) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DatasetError, match=r"1 of its images have names that are no UTF-8, the first .*: rename them"):
        loaded(folder, photos)


@pytest.mark.parametrize("ratio", [0, -1, 101, float("nan")])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ValueError, match=f"unlabeled_ratio is {ratio}: it must be above 0, and at most 100"):
        DataArguments("data", unlabeled_images="photos", unlabeled_ratio=ratio)
    with pytest.raises(ValueError, match="unlabeled_ratio has no effect without unlabeled_images"):
        DataArguments("data", unlabeled_ratio=2)
