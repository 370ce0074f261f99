import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3etr_hf.data.shapes import CATEGORIES, COLOURS, draw_scene, make_shapes
from d3etr_hf.errors import ShapesError


def make(folder: Path, **changes) -> Path:
    return make_shapes(folder, **{"train_images": 6, "val_images": 3, "progress": False, **changes})


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def annotations(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def test_two_runs_give_the_same_bytes(tmp_path):
    """Guards against unseeded randomness, times or paths in the files."""
    first, second = digests(make(tmp_path / "first")), digests(make(tmp_path / "second"))
    assert len(first) == 6 + 3 + 2 + 1
    assert first == second


def test_a_seed_gives_its_own_images_and_the_splits_differ(tmp_path):
    """Guards against the same pictures in training and validation, which would make every result look good."""
    folder, other = make(tmp_path / "zero"), make(tmp_path / "one", seed=1)
    images = [digest for one in (folder, other) for name, digest in digests(one).items() if name.endswith(".png")]
    assert len(set(images)) == len(images) == 18


def test_a_small_data_set_is_the_beginning_of_a_large_one(tmp_path):
    """Guards against image i depending on how many images there are."""
    small, large = make(tmp_path / "small"), make(tmp_path / "large", train_images=9)
    for index in range(1, 7):
        name = f"train/{index:06d}.png"
        assert (small / name).read_bytes() == (large / name).read_bytes()
    few, many = annotations(small), annotations(large)
    assert few["images"] == many["images"][:6]
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    assert len(many["annotations"]) > len(few["annotations"])


def test_boxes_and_areas_match_the_pixels():
    """Guards against boxes off by one, boxes of hidden parts and swapped axes, by colour where there is no noise."""
    lone_shapes = 0
    for seed in range(300):
        image, shapes = draw_scene(np.random.default_rng(seed), noise=False)
        pixels = np.asarray(image)
        assert 1 <= len(shapes) <= 4
        in_a_box = np.zeros(pixels.shape[:2], dtype=bool)
        for category_id, colour in COLOURS.items():
            of_class = (pixels == colour).all(axis=2)
            shapes_of_class = [shape for shape in shapes if shape.category_id == category_id]
            assert of_class.sum() == sum(shape.area for shape in shapes_of_class)
            for shape in shapes_of_class:
                left, top, width, height = shape.box
                inside = of_class[top : top + height, left : left + width]
                assert inside.shape == (height, width), "the box leaves the image"
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
                in_a_box[top : top + height, left : left + width] = True
            if len(shapes_of_class) == 1:
                lone_shapes += 1
                rows, columns = np.nonzero(of_class)
                tight = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
                assert shapes_of_class[0].box == tight
        assert (pixels[~in_a_box] == 128).all(), "something was drawn outside all boxes"
    assert lone_shapes > 300


def test_shapes_vary_in_size_and_hardly_overlap():
    """Guards against shapes that hide one another and against a data set of one size."""
    sides, counts = [], []
    for seed in range(300):
        _, shapes = draw_scene(np.random.default_rng(seed))
        counts.append(len(shapes))
        sides += [side for shape in shapes for side in shape.box[2:]]
        for index, first in enumerate(shapes):
            for second in shapes[:index]:
                grids = np.zeros((2, 96, 96), dtype=bool)
                for grid, (left, top, width, height) in zip(grids, (first.box, second.box), strict=True):
                    grid[top : top + height, left : left + width] = True
                assert grids.all(axis=0).sum() / grids.any(axis=0).sum() < 0.1
    # A later shape may cover a tenth of an earlier one.
    assert 16 * 0.9 - 2 <= min(sides) <= 17 and 42 <= max(sides) <= 44
    assert set(counts) == {1, 2, 3, 4}


def test_the_files_are_valid_coco(tmp_path):
    """Guards the format against pycocotools, and the images' noise against being left out."""
    from pycocotools.coco import COCO

    folder = make(tmp_path / "shapes", image_size=64)
    coco = COCO(folder / "annotations" / "val.json")
    assert {category["id"]: category["name"] for category in coco.dataset["categories"]} == CATEGORIES
    assert coco.getImgIds() == [1, 2, 3]
    for image_id in coco.getImgIds():
        record = coco.loadImgs(image_id)[0]
        image = Image.open(folder / "val" / record["file_name"])
        assert image.mode == "RGB" and image.size == (record["width"], record["height"]) == (64, 64)
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 500
        found = coco.loadAnns(coco.getAnnIds(image_id))
        assert found and all(0 < annotation["area"] <= np.prod(annotation["bbox"][2:]) for annotation in found)
        assert all(annotation["iscrowd"] == 0 for annotation in found)


def test_a_finished_folder_is_left_alone_and_an_interrupted_one_is_completed(tmp_path):
    """Guards against work done twice, and against a half-made data set being taken for a whole one."""
    folder = make(tmp_path / "shapes")
    expected = digests(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times

    (folder / "annotations" / "train.json").unlink()
    (folder / "train" / "000004.png").unlink()
    (folder / "val" / "000002.png").unlink()
    make(folder)
    assert digests(folder) == expected


def test_another_data_set_is_refused(tmp_path):
    """Guards against mixing two data sets in one folder."""
    folder = make(tmp_path / "shapes")
    before = digests(folder)
    for change in ({"seed": 1}, {"train_images": 7}, {"val_images": 2}, {"image_size": 64}):
        with pytest.raises(ShapesError, match=re.escape(f"{folder} holds another shapes data set")):
            make(folder, **change)
    assert digests(folder) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    """Guards the user's own files."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ShapesError, match=re.escape(f"{tmp_path} is not empty")):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_images": 0}, "train_images must be at least 1, got 0"),
        ({"image_size": 43}, "image_size must be at least 44, got 43"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    """Guards against a folder that is claimed by a data set that cannot be made."""
    with pytest.raises(ShapesError, match=message):
        make(tmp_path / "shapes", **change)
    assert not (tmp_path / "shapes").exists()
