"""More objects than a detector can find are told with the numbers, once."""

import logging

import pytest

from d3etr_hf.data import load_coco_split
from d3etr_hf.training.object_counts import describe_more_objects, warn_of_more_objects
from tests.data.coco_files import annotation, coco, write_split
from tests.tiny import tiny_model


@pytest.fixture
def crowded(tmp_path):
    """140 objects in one image, 3 in the other."""
    regions = [annotation(index, [index % 14 * 2, index // 14 * 2, 2, 2]) for index in range(140)]
    regions += [annotation(200 + index, [index, 1, 3, 3], image_id=7) for index in range(3)]
    regions += [annotation(300, [0, 0, 40, 30], image_id=7, iscrowd=1)]
    return load_coco_split(*write_split(tmp_path, coco(annotations=regions)), name="cells", cache_dir=tmp_path / "c")


def test_the_ceiling_is_that_of_a_count_by_hand(crowded):
    """Guards against a share of images, of objects that are found twice, and against crowds as objects."""
    assert crowded.object_counts().tolist() == [3, 140]
    (told,) = describe_more_objects(crowded, {"the model's": 12}, evaluated=False)
    # 12 of 140, and all 3
    assert told.startswith(
        "cells: 1 of 2 images hold more objects than the model's 12 queries, up to 140, so at most "
    )
    assert told.endswith(" 10 % of all objects can be found")
    of_queries, of_evaluation = describe_more_objects(crowded, {"the model's": 120}, evaluated=True)
    assert "120 queries" in of_queries and "86 %" in of_queries  # 123 of 143
    assert "the 100 detections of an image" in of_evaluation and "72 %" in of_evaluation  # 103 of 143
    assert describe_more_objects(crowded, {"the model's": 140}, evaluated=False) == []


def test_one_warning_names_models_and_splits(crowded, caplog, monkeypatch):
    """Guards against silence about a teacher that cannot see what it teaches."""
    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "propagate", True)
    student, teacher = tiny_model(), tiny_model(num_queries=9)
    warn_of_more_objects(student, teacher, {"train_dataset": crowded, "eval_dataset": crowded, "other": None})
    (record,) = [record for record in caplog.records if "queries" in record.message]
    for part in ("the model's 7 queries", "the teacher's 9 queries", "the 100 detections", "num_queries in its"):
        assert part in record.message
    assert record.message.count("the teacher's") == 1  # it is not evaluated
    caplog.clear()
    warn_of_more_objects(student, None, {"train_dataset": crowded.select([0])})
    assert caplog.records == []


def test_the_trainer_tells(crowded, caplog, monkeypatch, tmp_path):
    """Guards train, distill and evaluate, which all make one."""
    from d3etr_hf.data import DetectionTransform
    from tests.shapes_fixture import shapes_trainer
    from tests.tiny import small_image_processor

    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "propagate", True)
    content = crowded.with_transform(DetectionTransform(small_image_processor()))
    content.class_names = ["circle", "rectangle", "triangle"]
    monkeypatch.setattr("tests.shapes_fixture.load_shapes", lambda *_, **__: content)
    shapes_trainer(tmp_path, tmp_path / "run", teacher=None)
    assert "the model's 7 queries" in caplog.text
