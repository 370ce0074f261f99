"""YOLO's labels against values by hand; what is no label, no data.yaml, or lies elsewhere, is named."""

from pathlib import Path

import pytest
from PIL import ExifTags, Image

from d3etr_hf.data import DataArguments
from d3etr_hf.data.reading import check_places, read_splits
from d3etr_hf.data.yolo import YoloFolder, find_yolo, load_yolo_split, read_labels
from d3etr_hf.errors import DatasetError
from tests.data.formats import write_image, write_text, write_yolo


def labels(tmp_path: Path, text: str, keypoints: int = 0) -> list:
    write_text(tmp_path / "a.txt", text)
    return read_labels(tmp_path / "a.txt", YoloFolder(tmp_path, tmp_path, ["cat", "dog"], {}, keypoints))


def test_lines(tmp_path: Path) -> None:
    """Boxes, polygons, boxes with key points, empty lines and files, a byte order mark."""
    assert labels(tmp_path, "\ufeff0 0.5 0.5 0.25 0.5\n\n1.0 .25 .25 .5 .5\n") == [
        (0, (0.375, 0.25, 0.25, 0.5)),
        (1, (0, 0, 0.5, 0.5)),
    ]
    assert labels(tmp_path, "1 0.25 0.75 0.5 0.25 0.75 0.5") == [(1, (0.25, 0.25, 0.5, 0.5))]
    assert labels(tmp_path, "1 0.25 0.75 0.5 0.25 0.75 0.5 0.5 0.875") == [(1, (0.25, 0.25, 0.5, 0.625))]
    assert labels(tmp_path, "1 0.5 0.5 0.25 0.5 0.4 0.4 2 0.1 0.1 0", keypoints=6) == [(1, (0.375, 0.25, 0.25, 0.5))]
    assert labels(tmp_path, "\n") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat 0.5 0.5 0.1 0.1", "something else than numbers"),
        ("2 0.5 0.5 0.1 0.1", "class '2' is none of 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "class '-1' is none of 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "class '0.5' is none of 0 to 1"),
        ("nan 0.5 0.5 0.1 0.1", "class 'nan' is none"),
        ("0", "1 numbers are neither a box"),
        ("0 0.5 0.5 0.1", "4 numbers are neither a box"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers are neither a box"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.9 0.9", "8 numbers are neither a box"),
        ("0 20 15 10 10", "no fractions of the image"),
        ("0 0.5 nan 0.1 0.1", "no fractions of the image"),
    ],
)
def test_what_is_no_label(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DatasetError, match=f"a.txt, line 2: .*{message}"):
        labels(tmp_path, f"0 0.5 0.5 0.1 0.1\n{line}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat, [dog]]", "`names` is .*: list the name of each class"),
        ("names: {0: cat, 2: dog}", r"the keys of `names` are \[0, 2\]: number the classes from 0"),
        ("names: []", "`names` is"),
        ("nc: 3\nnames: [cat, dog]", "`nc` is 3, but there are 2 `names`"),
        ("names: [cat]\ntrain: images/nowhere", "`train` is 'images/nowhere', which is not there; looked for"),
        ("names: [cat]\ntrain: {a: b}", "`train` is {'a': 'b'}: name a folder"),
        ("names: [cat]\ntrain: .\nkpt_shape: [-1, 4]", r"`kpt_shape` is \[-1, 4\]: give the number of key points"),
        ("names: [cat]", "names no images: add `train` and `val`"),
        ('text: "a\nnames: b"', "`names` is None: list the name of each class"),
        (f"names: [cat]\npath: {'x' * 300}\ntrain: {'x' * 300}", "`train` is 'xx+[.]{3}x+', which is not there"),
        ("names: [cat\ntrain: x", "not valid YAML"),
    ],
)
def test_a_data_yaml_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    """Told before anything is loaded."""
    write_text(tmp_path / "data.yaml", text)
    with pytest.raises(DatasetError, match=f"data.yaml: .*{message}"):
        check_places(DataArguments(data_folder=str(tmp_path)))


def test_other_yaml_files_are_none_and_two_are_too_many(tmp_path: Path) -> None:
    write_text(tmp_path / "training.yaml", "batch: 3")
    write_text(tmp_path / "services.yaml", "names: [a, b]")
    assert find_yolo(tmp_path) is None
    write_image(tmp_path / "images" / "a.png")
    for name in ("cats.yaml", "dogs.yaml"):
        write_text(tmp_path / name, "names: [cat]\ntrain: images")
    with pytest.raises(DatasetError, match="cats.yaml, dogs.yaml each list names"):
        find_yolo(tmp_path)
    assert find_yolo(tmp_path / "dogs.yaml").class_names == ["cat"]


def test_names_as_numbers_and_flat_folders(tmp_path: Path) -> None:
    """Images without labels are empty ones; without splits a part is held out."""
    write_text(tmp_path / "data.yaml", "names: [1, yes]")
    for index in range(4):
        write_image(tmp_path / "images" / f"{index}.png")
    write_text(tmp_path / "labels" / "1.txt", "1 0.5 0.5 0.5 0.5")
    write_text(tmp_path / "labels" / "2.txt", "")
    train, val = read_splits(DataArguments(data_folder=str(tmp_path), validation_fraction=0.25))
    assert train.class_names == ["1", "yes"]
    assert sorted([*train.rows["image_id"], *val.rows["image_id"]]) == [1, 2, 3, 4]
    assert sum(len(boxes) for split in (train, val) for boxes in split.rows["boxes"]) == 1


def test_fractions_are_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg", exif=exif)
    write_text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5")
    yolo = YoloFolder(tmp_path, tmp_path, ["cat"], {"train": [tmp_path / "images"]})
    dataset = load_yolo_split(yolo, "train", "a/train")
    assert dataset.read_image(0).size == (30, 40) and dataset[0]["target"]["boxes"].tolist() == [[7.5, 10, 22.5, 30]]


def test_entries_lie_in_the_folder_that_the_user_named(tmp_path: Path) -> None:
    """Guards files of this machine against lists, links and labels in data that somebody else made."""
    write_image(tmp_path / "elsewhere" / "images" / "a.png")
    write_text(tmp_path / "elsewhere" / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5")
    data = tmp_path / "data"
    write_text(data / "data.yaml", "names: [cat]\ntrain: train.txt\nval: train.txt")
    write_text(data / "train.txt", "../elsewhere/images/a.png\n")

    def read(**options: bool) -> None:
        read_splits(DataArguments(data_folder=str(data), **options))

    with pytest.raises(DatasetError, match="1 of its images lie outside the folders that were named"):
        read()
    read(allow_images_elsewhere=True)
    write_image(data / "images" / "a.png")
    write_text(data / "train.txt", "images/a.png\n")
    (data / "labels").mkdir()
    (data / "labels" / "a.txt").symlink_to(tmp_path / "elsewhere" / "labels" / "a.txt")
    with pytest.raises(DatasetError, match="1 of its label files lie outside"):
        read()
    write_text(data / "data.yaml", f"names: [cat]\npath: {tmp_path / 'elsewhere'}\ntrain: images\nval: images")
    (data / "images").rename(data / "others")
    with pytest.raises(DatasetError, match="1 of its folders of images lie outside .*--allow_images_elsewhere true"):
        read()
    read(allow_images_elsewhere=True)
    write_text(data / "data.yaml", f"names: [cat]\npath: /\ntrain: {tmp_path.parts[1]}\nval: images")
    with pytest.raises(DatasetError, match="1 of its folders of images lie outside"):
        read()


def test_a_split_that_is_listed_and_absent_matters_where_it_is_chosen(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("test: images/test\n")
    assert len(read_splits(DataArguments(data_folder=str(tmp_path)))[1]) == 2
    with pytest.raises(DatasetError, match="`test` is 'images/test', which is not there"):
        read_splits(DataArguments(data_folder=str(tmp_path), dataset_val_split="test"))


def test_labels_of_the_last_folder_of_images_and_key_points_that_the_data_yaml_says(tmp_path: Path) -> None:
    write_text(tmp_path / "data.yaml", "names: [cat]\nkpt_shape: [1, 3]\ntrain: images/a/images\nval: images/a/images")
    write_image(tmp_path / "images" / "a" / "images" / "1.png")
    write_text(tmp_path / "images" / "a" / "labels" / "1.txt", "0 0.5 0.5 0.5 1.0 0.1 0.1 2")
    train, _ = read_splits(DataArguments(data_folder=str(tmp_path)))
    assert train.rows["boxes"][0] == [[10, 0, 30, 30]]


def test_labels_lie_beside_the_images_that_the_data_yaml_names(tmp_path: Path) -> None:
    """Absolute paths of images alone, in a file that begins with the mark of Windows."""
    write_image(tmp_path / "elsewhere" / "images" / "a.png")
    write_text(tmp_path / "elsewhere" / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5")
    images = tmp_path / "elsewhere" / "images"
    write_text(tmp_path / "data" / "data.yaml", f"\ufeffnames: [cat]\ntrain: {images}\nval: {images}")
    with pytest.raises(DatasetError, match="outside the folders that were named"):
        read_splits(DataArguments(data_folder=str(tmp_path / "data")))
    train, _ = read_splits(DataArguments(data_folder=str(tmp_path / "data"), allow_images_elsewhere=True))
    assert [len(boxes) for boxes in train.rows["boxes"]] == [1]


def test_a_list_of_names_that_no_file_can_have(tmp_path: Path) -> None:
    write_text(tmp_path / "data.yaml", "names: [cat]\ntrain: train.txt\nval: train.txt")
    write_text(tmp_path / "train.txt", "x" * 300)
    with pytest.raises(DatasetError, match="1 of its images are missing"):
        read_splits(DataArguments(data_folder=str(tmp_path)))


def test_images_or_labels_that_are_missing(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    for path in (tmp_path / "labels" / "train").iterdir():
        path.unlink()
    with pytest.raises(
        DatasetError, match="split train: none of 2 images has labels; looked for .*labels/train/3.txt'"
    ):
        read_splits(DataArguments(data_folder=str(tmp_path)))
    for path in (tmp_path / "images" / "train").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="split train: no images in .*images/train'"):
        read_splits(DataArguments(data_folder=str(tmp_path)))
