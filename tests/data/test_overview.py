"""The numbers of a split against a count by hand."""

import numpy as np
import pytest
from transformers import RTDetrImageProcessorPil

from d3etr_hf.data import load_coco_split
from d3etr_hf.data.overview import overview_of, overview_table
from tests.data.coco_files import annotation, coco, write_split
from tests.tiny import small_image_processor


@pytest.fixture
def dataset(tmp_path):
    """Images of 200×100, 100×100 and 50×50; objects of 31², 32², 96×100 and a crowd."""
    sides = {1: (200, 100), 2: (100, 100), 3: (50, 50)}
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in sides.items()]
    regions = [
        annotation(1, [0, 0, 31, 31], image_id=1),
        annotation(2, [0, 0, 32, 32], image_id=1, category_id=90),
        annotation(3, [0, 0, 96, 100], image_id=2),
        annotation(4, [0, 0, 90, 90], image_id=2, iscrowd=1),
    ]
    split = write_split(tmp_path, coco(images=images, annotations=regions))
    return load_coco_split(*split, name="mine/train", cache_dir=tmp_path / "cache")


def test_counts(dataset):
    """Guards against crowds as objects, and classes in another order."""
    found = overview_of(dataset)
    assert found.objects.tolist() == [2, 1, 0]
    assert dict(found.image_sizes) == {(200, 100): 1, (100, 100): 1, (50, 50): 1}
    assert dict(zip(dataset.class_names, found.class_counts.tolist(), strict=True)) == {
        "aeroplane": 2,
        "tooth brush": 1,
    }
    assert found.areas.tolist() == [31**2, 32**2, 9600] and found.resized_areas is None


def test_areas_after_resizing(dataset):
    """Guards against sides in place of areas: by the short side, and to squares."""
    by_side = overview_of(dataset, small_image_processor(short_side=50, long_side=400))
    np.testing.assert_allclose(by_side.resized_areas, [31**2 / 4, 32**2 / 4, 9600 / 4])
    squares = RTDetrImageProcessorPil(size={"height": 100, "width": 100})
    np.testing.assert_allclose(overview_of(dataset, squares).resized_areas, [31**2 / 2, 32**2 / 2, 9600])


def test_table(dataset):
    """Guards what people read."""
    processor = small_image_processor(short_side=50, long_side=400)
    table = overview_table([overview_of(dataset, processor)] * 2, dataset.class_names, processor)
    lines = {line[:24].strip(): line.split() for line in table.splitlines()}
    assert lines["images without objects"][-2:] == ["1", "1"]
    assert "200×100, 100×100, 50×50" in table and table.splitlines()[0].split() == ["mine/train", "mine/train"]
    assert "1.0, most 2" in table
    assert lines["small objects (< 32²)"][-4:] == ["33", "%", "33", "%"]
    assert lines["tooth brush"][-2:] == ["1", "1"]
    assert "resized to short_side 50, long_side 400" in table
    assert table.count("67 %") == 2  # small ones after it, in both splits
