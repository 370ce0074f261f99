"""Pascal VOC's files against values by hand; what cannot be read is named."""

from pathlib import Path

import pytest

from d3etr_hf.data import DataArguments
from d3etr_hf.data.pascal_voc import VocObject, find_voc, load_voc_split, read_voc
from d3etr_hf.data.reading import read_splits
from d3etr_hf.errors import DatasetError
from tests.data.formats import SCENES, voc_xml, write_image, write_text, write_voc

BOX = "<bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"


def voc(tmp_path: Path, content: str):
    write_text(tmp_path / "a.xml", content)
    return read_voc(tmp_path / "a.xml")


def test_corners_are_the_first_and_the_last_pixel(tmp_path: Path) -> None:
    """From 1: 1..40 are all 40 pixels. From 0, as some tools write, nothing leaves the image."""
    for first, expected in [(1, [0, 0, 40, 30]), (0, [0, 0, 40, 30]), (11, [10, 0, 30, 30])]:
        found = voc(tmp_path, f"<annotation><object><name> cat </name>{BOX.format(first)}</object></annotation>")
        assert found.objects == [VocObject("cat", expected, False)] and found.size is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "cannot be read as XML"),
        ("", "cannot be read as XML"),
        ("<svg></svg>", "its root is <svg>"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation/>', "it has a DOCTYPE"),
        (f"<annotation><object>{BOX.format(1)}</object></annotation>", "object 1: has no <name>"),
        ("<annotation><object><name>cat</name></object></annotation>", "object 1 .'cat'.: <bndbox> lacks a corner"),
        (f"<annotation><object><name>cat</name>{BOX.format('x')}</object></annotation>", "<bndbox/xmin> is 'x'"),
        (f"<annotation><object><name>cat</name>{BOX.format('nan')}</object></annotation>", "<bndbox/xmin> is 'nan'"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DatasetError, match=f"a.xml.*{message}"):
        voc(tmp_path, content)


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    """Guards labels that differ because one split lacks a class, and those of difficult objects."""
    for split, thing, difficult in (("train", "mug", 0), ("val", "fern", 0), ("val", "lamp", 1)):
        write_image(tmp_path / split / f"{thing}.png")
        write_text(tmp_path / split / f"{thing}.xml", voc_xml(f"{thing}.png", [(thing, [1, 2, 10, 10])], difficult))
    train, val = read_splits(DataArguments(data_folder=str(tmp_path)))
    assert train.class_names == val.class_names == ["fern", "lamp", "mug"]
    assert [val[index]["target"]["class_labels"].tolist() for index in (0, 1)] == [[0], []]
    assert [each["iscrowd"] for each in val.ground_truth["annotations"]] == [0, 1]


def test_a_document_type_in_another_encoding(tmp_path: Path) -> None:
    """Guards against entities that the bytes do not show."""
    text = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>'
    (tmp_path / "a.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(DatasetError, match="a.xml.*it has a DOCTYPE"):
        read_voc(tmp_path / "a.xml")


def test_a_list_of_files_that_another_archive_holds(tmp_path: Path) -> None:
    """Guards against a refusal of all for a split that nobody asked for."""
    write_voc(tmp_path)
    write_text(tmp_path / "ImageSets" / "Main" / "test.txt", "4\n5\n")
    assert len(read_splits(DataArguments(data_folder=str(tmp_path)))[1]) == 2
    with pytest.raises(DatasetError, match="split test: 2 of its annotation files are missing"):
        read_splits(DataArguments(data_folder=str(tmp_path), dataset_val_split="test"))


def test_layouts(tmp_path: Path) -> None:
    """VOCdevkit's inner folder; Annotations/train beside images/train; one flat folder without splits."""
    write_voc(tmp_path / "devkit" / "VOC2007")
    assert find_voc(tmp_path / "devkit").folder == tmp_path / "devkit" / "VOC2007"
    nested, flat = tmp_path / "nested", tmp_path / "flat"
    for name, things in SCENES.items():
        for split in ("train", "test"):
            write_image(nested / "images" / split / name)
            write_text(nested / "annotations" / split / f"{Path(name).stem}.xml", voc_xml(name, things))
        write_image(flat / "images" / name)
        write_text(flat / "annotations" / f"of_{Path(name).stem}.xml", voc_xml(f"C:\\photos\\{name}", things))
    assert list(find_voc(nested).splits) == ["train", "test"]
    dataset = load_voc_split(find_voc(flat), "train", "flat/train")
    assert sorted(Path(path).name for path in dataset.rows["image_path"]) == sorted(SCENES)
    assert find_voc(tmp_path) is None


def test_a_list_names_files_of_the_folder_alone(tmp_path: Path) -> None:
    """Guards files of this machine against lists in data that somebody else made."""
    data = tmp_path / "data"
    write_voc(data)
    write_text(tmp_path / "secret.xml", voc_xml("3.png", SCENES["3.png"]))
    write_text(data / "ImageSets" / "Main" / "train.txt", "../../secret\n")
    with pytest.raises(DatasetError, match="1 of its annotation files lie outside"):
        read_splits(DataArguments(data_folder=str(data)))
    train, _ = read_splits(DataArguments(data_folder=str(data), allow_images_elsewhere=True))
    assert len(train) == 1
    write_text(data / "ImageSets" / "Main" / "train.txt", "4\n")
    with pytest.raises(DatasetError, match="1 of its annotation files are missing, the first .*4.xml'"):
        read_splits(DataArguments(data_folder=str(data)))
    write_voc(data)
    (data / "JPEGImages" / "3.png").unlink()
    with pytest.raises(DatasetError, match="split train: 1 of its images are missing, the first .*3.png'"):
        read_splits(DataArguments(data_folder=str(data)))
