"""What annotation tools write beside COCO's letter."""

import copy
import json
import logging
from pathlib import Path

import pytest

from d3etr_hf.data.coco import load_coco_split
from d3etr_hf.data.coco_forms import usual_form
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import coco, write_split
from tests.data.formats import write_image

PARENT = {"id": 0, "name": "things", "supercategory": "none"}
CHILDREN = [{**each, "supercategory": "things"} for each in coco()["categories"]]


def test_a_parent_that_no_box_has_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At each load, from the cache too; also where its only class has its name."""
    annotations, images = write_split(tmp_path, coco(categories=[PARENT, *CHILDREN]))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            dataset = load_coco_split(annotations, images, cache_dir=tmp_path / "cache")
        assert dataset.class_names == ["aeroplane", "tooth brush"]
        assert caplog.text.count("category 0, 'things', is a parent of the others that no box has") == 1
        assert [each["id"] for each in dataset.ground_truth["categories"]] == [90, 5]
    single = [{"id": 0, "name": "mug", "supercategory": "none"}, {"id": 1, "name": "mug", "supercategory": "mug"}]
    of_one = [{**each, "category_id": 1} for each in coco()["annotations"]]
    assert usual_form(coco(categories=single, annotations=of_one))[0]["categories"] == single[1:]


def test_a_category_that_has_boxes_or_no_children_stays() -> None:
    used = [*coco()["annotations"], {"id": 99, "image_id": 3, "category_id": 0, "bbox": [1, 1, 2, 2]}]
    for content in (
        coco(categories=[PARENT, *CHILDREN], annotations=used),
        coco(categories=[PARENT, *coco()["categories"]]),
        coco(categories=[{**PARENT, "supercategory": "things"}, *coco()["categories"]]),
    ):
        before = copy.deepcopy(content)
        assert usual_form(content) == (before, [])


def test_ids_as_text_are_numbered(tmp_path: Path) -> None:
    """Numbers as text stay these; names are numbered in their order, and are the classes' names."""
    categories = [{"id": "tooth brush"}, {"id": "aeroplane"}]
    names = {5: "aeroplane", 90: "tooth brush"}
    images = [{**each, "id": str(each["id"])} for each in coco()["images"]]
    annotations = [
        {**each, "category_id": names[each["category_id"]], "image_id": str(each["image_id"])}
        for each in coco()["annotations"]
    ]
    content = coco(categories=categories, images=images, annotations=annotations)
    dataset = load_coco_split(*write_split(tmp_path, content))
    assert (dataset.class_names, dataset.category_ids) == (["aeroplane", "tooth brush"], [1, 2])
    assert dataset.rows["image_id"][:] == [7, 3]
    assert dataset[1]["target"]["class_labels"].tolist() == [1, 0]
    assert [each["category_id"] for each in dataset.ground_truth["annotations"]] == [2, 1, 1]


@pytest.mark.parametrize("content", [None, [], {"images": []}, coco(images=[3]), coco(categories=[{"id": [1]}])])
def test_what_is_none_of_coco_is_left_to_the_checks(content: object) -> None:
    assert usual_form(content) == (content, [])


@pytest.mark.parametrize("prefix", ["", "images\\", "images\\7\\"])
def test_names_as_on_windows_are_found(prefix: str, tmp_path: Path) -> None:
    images = [{**each, "file_name": f"{prefix}{each['file_name']}"} for each in coco()["images"]]
    annotations, _ = write_split(tmp_path / "data", coco())
    annotations.write_text(json.dumps(coco(images=images)))
    for each in coco()["images"]:
        write_image(tmp_path / "ls" / prefix.replace("\\", "/") / each["file_name"])
    dataset = load_coco_split(annotations, tmp_path / "ls")
    assert dataset.read_image(0).size == (40, 30)


def test_a_file_that_has_a_backslash_in_its_name_is_that(tmp_path: Path) -> None:
    images = [{**each, "file_name": f"images\\{each['file_name']}"} for each in coco()["images"]]
    dataset = load_coco_split(*write_split(tmp_path, coco(images=images)))
    assert dataset.read_image(0).size == (40, 30)


@pytest.mark.parametrize("prefix", ["..\\..\\label-studio\\upload\\4\\", "images\\7/"])
def test_a_file_of_the_same_name_elsewhere_is_told(prefix: str, tmp_path: Path) -> None:
    images = [{**each, "file_name": f"{prefix}{each['file_name']}"} for each in coco()["images"]]
    annotations, _ = write_split(tmp_path / "data", coco())
    annotations.write_text(json.dumps(coco(images=images)))
    for each in coco()["images"]:
        write_image(tmp_path / "ls" / "images" / each["file_name"].upper())
    with pytest.raises(DatasetError, match="there is 'images/7.PNG' in .*ls': `file_name` may say another folder"):
        load_coco_split(annotations, tmp_path / "ls")
