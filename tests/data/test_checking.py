import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3etr_hf.data.checking import ROUNDING, check_coco
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import annotation, coco


def test_labels_follow_the_order_of_raw_ids_and_boxes_stay_with_their_image() -> None:
    """Guards against labels in file order, and against boxes of one image given to another."""
    checked = check_coco(coco(), "val.json")
    assert checked.class_names == ["aeroplane", "tooth brush"]
    assert checked.category_ids == [5, 90]
    assert [image["id"] for image in checked.images] == [7, 3]
    assert [boxes.tolist() for boxes in checked.boxes] == [[[0.5, 0, 40, 30]], [[1, 2, 11, 22], [20, 10, 25, 15]]]
    assert [labels.tolist() for labels in checked.class_labels] == [[0], [1, 0]]
    assert checked.report == ""


def test_boxes_of_an_image_keep_the_order_of_the_file() -> None:
    """Guards against an unstable sort, by which runs on different machines would differ."""
    regions = [annotation(i, [0, 0, 1 + i / 100, 5], image_id=(7, 3)[i % 3 == 0]) for i in range(600)]
    checked = check_coco(coco(annotations=regions), "val.json")
    for boxes, image_id in zip(checked.boxes, (7, 3), strict=True):
        expected = [1 + region["id"] / 100 for region in regions if region["image_id"] == image_id]
        np.testing.assert_allclose(boxes[:, 2], expected, rtol=1e-6)


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 2, 3], [1, 13, 90], [2**40, -7, 0]])
def test_category_ids_of_any_kind(ids: list[int]) -> None:
    """Guards against labels that assume ids from 0, from 1, or without gaps."""
    categories = [{"id": category_id, "name": f"name of {category_id}"} for category_id in ids]
    regions = [annotation(i, [1, 1, 5, 5], category_id=category_id) for i, category_id in enumerate(ids)]
    checked = check_coco(coco(categories=categories, annotations=regions), "val.json")
    labels = checked.class_labels[1].tolist()
    assert [checked.category_ids[label] for label in labels] == ids
    assert [checked.class_names[label] for label in labels] == [f"name of {category_id}" for category_id in ids]


def test_an_image_without_boxes_is_kept() -> None:
    """Guards against losing background images, first, middle or last."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(5)]
    regions = [annotation(1, [0, 0, 9, 9], image_id=1), annotation(2, [0, 0, 8, 8], image_id=3)]
    checked = check_coco(coco(images=images, annotations=regions), "val.json")
    assert [len(boxes) for boxes in checked.boxes] == [0, 1, 0, 1, 0]
    assert all(boxes.shape == (len(boxes), 4) and boxes.dtype == np.float32 for boxes in checked.boxes)
    assert all(labels.dtype == np.int64 for labels in checked.class_labels)


def test_crowds_are_no_labels_and_no_fault() -> None:
    """Guards against training on crowd regions, and against a warning for every COCO file that has some."""
    regions = [*coco()["annotations"], annotation(14, [0, 0, 10, 10], iscrowd=1)]
    checked = check_coco(coco(annotations=regions), "val.json")
    assert sum(map(len, checked.boxes)) == 3
    assert checked.report == ""


def test_fields_that_coco_files_often_lack() -> None:
    """Guards against failing on a file without `area` and `iscrowd`."""
    checked = check_coco(coco(annotations=[annotation(1, [0, 0, 9, 9])]), "val.json")
    assert checked.boxes[1].tolist() == [[0, 0, 9, 9]]


def test_the_report_counts_each_kind_and_names_the_first() -> None:
    """Guards against data that are dropped without a word, and against a box counted twice."""
    regions = [
        annotation(1, [1e308, 0, 1e308, 5]),
        annotation(2, [0, 1e308, 5, 1e308]),
        annotation(3, [5, 5, -1, 5]),
        annotation(4, [5, 5, 0, 5]),
        annotation(5, [-20, 0, 10, 10]),
        annotation(6, [40, 0, 10, 10]),
        annotation(7, [-5, 0, 10, 10]),
        annotation(8, [30, 20, 1e-12, 5]),
        annotation(9, [3, 3, 37.01, 27.01]),
    ]
    checked = check_coco(coco(annotations=regions), "val.json")
    assert checked.report == (
        "val.json: boxes not finite dropped: 2 (first annotation ids [1, 2]); "
        "of negative size dropped: 1 (first annotation ids [3]); "
        "without area dropped: 1 (first annotation ids [4]); "
        "outside their image dropped: 2 (first annotation ids [5, 6]); "
        "too thin to have an area dropped: 1 (first annotation ids [8]); "
        "partly outside their image clipped: 1 (first annotation ids [7]); "
        "this is about training labels: evaluation reads the annotations as they are."
    )
    assert checked.boxes[1].tolist() == [[0, 0, 5, 10], [3, 3, 40, 30]]


numbers = st.one_of(st.floats(-60, 60, width=32), st.integers(-60, 60), st.sampled_from([1e308, -1e308]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=12))
def test_boxes_against_a_loop(boxes: list[tuple[float, ...]]) -> None:
    """Guards the vectorised clipping and dropping against a loop over single boxes."""
    expected, clipped = [], 0
    for x, y, width, height in boxes:
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, 40), min(y + height, 30)
        if not all(map(math.isfinite, (x + width, y + height))) or width <= 0 or height <= 0:
            continue
        if not (np.float32(right) > np.float32(left) and np.float32(bottom) > np.float32(top)):
            continue
        expected.append([left, top, right, bottom])
        clipped += max(left - x, top - y, x + width - right, y + height - bottom) > ROUNDING
    # One more, good box: a split without any is an error.
    regions = [annotation(i, list(box)) for i, box in enumerate([*boxes, (0, 0, 2, 2)])]
    checked = check_coco(coco(annotations=regions), "val.json")
    np.testing.assert_allclose(checked.boxes[1], [*expected, [0, 0, 2, 2]], rtol=1e-6)
    counts = [int(count) for count in re.findall(r"dropped: (\d+)", checked.report)]
    assert sum(counts) == len(boxes) - len(expected)
    assert sum(int(count) for count in re.findall(r"clipped: (\d+)", checked.report)) == clipped


def without(key: str) -> Callable[[dict], None]:
    return lambda content: content.pop(key)


def change(part: str, index: int, **fields: object) -> Callable[[dict], None]:
    return lambda content: content[part][index].update(fields)


def lacking(part: str, index: int, field: str) -> Callable[[dict], None]:
    return lambda content: content[part][index].pop(field)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("images"), "`images` is missing"),
        (without("annotations"), "`annotations` is missing"),
        (without("categories"), "`categories` is missing"),
        (lambda content: content.update(images={}), "`images` is a dict"),
        (lambda content: content.update(categories=[]), "`categories` is empty"),
        (lambda content: content.update(images=[3]), r"images\[0\] is a int"),
        (change("images", 1, id="3"), r"images\[1\] \(id '3'\) has `id` '3'"),
        (change("images", 1, id=2**63), "at most 64 bits"),
        (change("images", 1, id=True), "`id` True"),
        (lacking("images", 0, "width"), r"images\[0\] \(id 7\) has `width` None"),
        (change("images", 0, height=0), r"images\[0\] \(id 7\) has `height` 0"),
        (change("images", 1, id=7), "image id 7 appears more than once"),
        (lacking("annotations", 1, "id"), r"annotations\[1\] \(id None, image_id 7\) has `id` None"),
        (change("annotations", 1, image_id=4), "annotation 12 of image 4: `images` does not list"),
        (change("annotations", 1, category_id=6), "annotation 12 of image 7 has category 6"),
        (change("annotations", 1, id=11), "annotation id 11 appears more than once"),
        (lacking("annotations", 2, "bbox"), r"annotations\[2\] \(id 13, image_id 3\) has `bbox` None"),
        (change("annotations", 2, bbox=[1, 2, 3]), r"id 13, image_id 3\) has `bbox` \[1, 2, 3\]"),
        (change("annotations", 2, bbox=[1, 2, 3, "4"]), r"id 13, image_id 3\) has `bbox`"),
        (change("categories", 0, id=5), "category id 5 appears more than once"),
        (change("categories", 0, name="aeroplane"), "category name 'aeroplane' appears more than once"),
        (lacking("categories", 1, "name"), r"categories\[1\] \(id 5\) has `name` None"),
        (lambda content: content.update(annotations=[]), "no usable box is left of 0 annotations"),
        (
            lambda content: content.update(
                annotations=[annotation(8, [1, 1, 0, 1]), annotation(9, [1] * 4, iscrowd=1)]
            ),
            r"no usable box is left of 2 annotations \(1 crowd regions; without area dropped: 1 .*\[8\]",
        ),
    ],
)
def test_damage_is_one_clear_error(damage: Callable[[dict], None], message: str) -> None:
    """Guards against damaged files that pass, or fail somewhere deep with a KeyError."""
    content = coco()
    damage(content)
    with pytest.raises(DatasetError, match=message) as caught:
        check_coco(content, "folder/val.json")
    assert "folder/val.json" in str(caught.value)


def test_a_list_at_the_top_level_is_refused() -> None:
    """Guards against a TypeError for files that hold the bare list of results or annotations."""
    with pytest.raises(DatasetError, match=r"val\.json: holds a list"):
        check_coco([], "val.json")
