"""What reading accepts of a COCO file is what training and evaluation can use."""

import json
import time
import warnings

import pytest

from d3etr_hf.data.checking import check_coco
from d3etr_hf.data.coco_fields import check_fields, without_nulls
from d3etr_hf.errors import DatasetError
from d3etr_hf.evaluation.coco_average_precision import coco_average_precision
from tests.data.coco_files import coco

# as JSON writes them: some are no value that Python would write
CONSTANTS = ["null", "true", "false", "NaN", "-Infinity", "[]", "[1, 2, 3, 4]", "{}", "[" * 300 + "]" * 300]
NUMBERS = ["0", "1", "2", "-1", "0.0", "1.5", "1e400", "1" * 400, "9223372036854775808"]
TEXTS = ['"0"', '"1"', '""', '"' + "x" * 200_000 + '"', r'"\ud800"', r'"a\u0000b"']
ODD = [*CONSTANTS, *NUMBERS, *TEXTS]
BOXES = [f"[1, 2, {value}, 4]" for value in ODD] + ["[1, 2, 3]", "[1, 2, 3, 4, 5]", "[-5, -5, 1e308, 1e308]"]
FIELDS = {
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "images": ("id", "width", "height", "file_name"),
    "categories": ("id", "name"),
}


def with_field(part: str, field: str, value: str) -> dict:
    """The good file with one field of its first entry written so, and read back."""
    content = coco()
    content[part][0][field] = "@"
    return json.loads(json.dumps(content).replace('"@"', value))


def found_by(checked) -> list[dict]:
    """The training labels as a detector's results."""
    return [
        {
            "image_id": image["id"],
            "category_id": checked.category_ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": 1.0,
        }
        for image, boxes, labels in zip(checked.images, checked.boxes, checked.class_labels, strict=True)
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("part", "field"), [(part, field) for part, fields in FIELDS.items() for field in fields])
def test_odd_values_are_refused_or_mean_the_same_to_training_and_evaluation(part: str, field: str) -> None:
    """Guards against a crowd to one and an object to the other, and against failing after an epoch of training."""
    for value in ODD + (BOXES if field == "bbox" else []):
        content = with_field(part, field, value)
        try:
            checked = check_coco(content, "val.json", file_names=True)
        except DatasetError as error:
            assert "val.json" in str(error) and len(str(error)) < 500, value
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = coco_average_precision(without_nulls(content), found_by(checked))
        if not checked.report:  # every object that is not a crowd is trained on, and found
            assert result["AP"] == pytest.approx(1), value


def test_the_first_fault_is_named_and_the_others_are_counted() -> None:
    """Guards against mending a file of a hundred thousand annotations one run at a time."""
    content = coco()
    content["annotations"][1] |= {"iscrowd": "0", "area": -1}
    content["annotations"][2]["bbox"] = [1, 2, "3", 4]
    with pytest.raises(DatasetError) as caught:
        check_fields(content, "val.json")
    assert str(caught.value) == (
        "val.json: annotations[1] (id 12, image_id 7) has `area` -1: it must be a finite number of at least 0, in "
        "pixels, or null or left out for the area of the box (2 more such faults follow)."
    )


@pytest.mark.parametrize("left_out", [False, True])
def test_an_area_that_is_null_is_that_of_the_box(left_out: bool) -> None:
    """Guards against a failure at the first evaluation."""
    content, known = coco(), coco()
    for region in content["annotations"]:
        region |= {"area": None, "iscrowd": None}
        if left_out:
            del region["area"], region["iscrowd"]
    for region in known["annotations"]:
        region["area"] = region["bbox"][2] * region["bbox"][3]
    found = [
        {"image_id": region["image_id"], "category_id": region["category_id"], "bbox": region["bbox"], "score": 0.5}
        for region in content["annotations"]
    ]
    expected = coco_average_precision(known, found)
    assert coco_average_precision(content, found) == coco_average_precision(without_nulls(content), found) == expected


def test_a_large_file_is_checked_quickly() -> None:
    """Guards against a check that takes longer than reading."""
    region = coco()["annotations"][0]
    content = coco(annotations=[{**region, "id": index} for index in range(20_000)])
    start = time.process_time()
    check_fields(content, "val.json", file_names=True)
    assert time.process_time() - start < 1
