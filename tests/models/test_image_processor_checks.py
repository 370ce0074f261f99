"""Settings of an image processor that make no pixels: one line that names them."""

import json
import math
import os

import pytest

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.image_processors import load_image_processor, new_image_processor

FILE = "preprocessor_config.json"


@pytest.mark.parametrize("family", ["conditional_detr", "rf_detr"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", {"height": 0, "width": 64}),
        ("size", {"height": 10**6, "width": 10**6}),
        ("size", {"shortest_edge": -800, "longest_edge": 1333}),
        ("size", {"shortest_edge": "800", "longest_edge": 1333}),
        ("size", {"shortest_edge": 10_000, "longest_edge": 10_000}),
        ("size", {"diagonal": 800}),
        ("size", {}),
        ("size", {"height": True, "width": True}),
        ("pad_size", {"height": 10**6, "width": 64}),
        ("resample", True),
        ("backend", "torchvision"),
        ("image_std", [0.2, 0, 0.2]),
        ("image_std", [0.2, 0.2]),
        ("image_mean", ["a", 0.5, 0.5]),
        ("image_mean", [0.5, math.nan, 0.5]),
        ("resample", 99),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("do_resize", "nonsense"),
        ("do_normalize", 3),
    ],
)
def test_setting_is_named(tmp_path, family, name, value):
    new_image_processor(family).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(settings | {name: value}))
    with pytest.raises(DetectorLoadError, match=f"{tmp_path}: {FILE}: {name} is ") as caught:
        load_image_processor(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{}", '{"image_processor_type": "nonsense"}'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DetectorLoadError, match=FILE):
        load_image_processor(str(tmp_path))


def test_a_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(DetectorLoadError, match=FILE):
        load_image_processor(str(tmp_path))


@pytest.mark.parametrize(
    "size",
    [
        800,
        {"shortest_edge": 480, "longest_edge": 9000},
        {"height": 64, "width": 48},
        {"max_height": 64, "max_width": 64},
    ],
)
def test_sizes_of_every_kind_are_read(tmp_path, size):
    """As checkpoints have them, an old one as a single number."""
    settings = json.loads(new_image_processor("conditional_detr").to_json_string()) | {"size": size}
    settings |= {"max_size": 1333} if isinstance(size, int) else {}
    (tmp_path / FILE).write_text(json.dumps(settings))
    read = {name: side for name, side in dict(load_image_processor(str(tmp_path)).size).items() if side}
    assert read == ({"shortest_edge": 800, "longest_edge": 1333} if isinstance(size, int) else size)
