"""Class names of any script are written in pictures, by a font that has their characters, or are numbers."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image

from d3etr_hf.visualization import lettering
from d3etr_hf.visualization.detection_grid import draw_detection_grid
from d3etr_hf.visualization.lettering import fonts_for, written, written_names
from d3etr_hf.visualization.training_curves import draw_training_curves


def characters(family: str | None) -> set[int]:
    return set(FT2Font(findfont(FontProperties(family=family))).get_charmap())


# letters, of a font that comes with matplotlib, which its default lacks
UNUSUAL = "".join(
    chr(code) for code in sorted(characters("STIXGeneral") - characters(None)) if 0x1D80 <= code < 0x1DC0
)
CUPS = ["杯子", "lamp", "蕨类"]


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch):
    """The fonts that come with matplotlib alone, whatever this machine has."""
    own = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)
    for function in (lettering._other_fonts, lettering._fonts_for):
        function.cache_clear()
    lettering.logger.warning_once.__func__.cache_clear()
    yield
    for function in (lettering._other_fonts, lettering._fonts_for):
        function.cache_clear()


def drawn(path: Path, class_names: list[str], title: str = "model") -> np.ndarray:
    """A picture of one detection of each class; a warning of matplotlib's fails it."""
    detections = torch.tensor([[10.0 + 25 * label, 40, 20, 20, 0.9, label] for label in range(len(class_names))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_detection_grid([Image.new("RGB", (100, 80))], {title: [detections]}, class_names, path)
    return np.asarray(Image.open(path))


def test_a_font_that_has_the_characters_is_found(tmp_path: Path) -> None:
    """Guards against empty boxes in the place of names."""
    assert UNUSUAL and fonts_for(UNUSUAL) == ["STIXGeneral"] and fonts_for("lamp é ж") == []
    assert written_names([UNUSUAL, "lamp"]) == [UNUSUAL, "lamp"]
    drawn(tmp_path / "a.png", [UNUSUAL, "lamp"], title=UNUSUAL)


def test_names_that_no_font_has_are_numbers_and_a_hint_once(tmp_path: Path, caplog, monkeypatch) -> None:
    """Guards against empty boxes, which name no class, and against a warning a picture."""
    monkeypatch.setattr(logging.getLogger("d3etr_hf"), "propagate", True)
    picture = drawn(tmp_path / "a.png", CUPS)
    assert [record for record in caplog.records if "fonts-noto-cjk" in record.message][1:] == []
    assert "2 of 3 class names have characters" in caplog.text and "pictures call it 'class 0'" in caplog.text
    expected = drawn(tmp_path / "b.png", ["class 0", "lamp", "class 2"])
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize(
    "name", ["$5 or $10", "5$ & 10$", "tag $1_a to $2", "100% {new}", "$a^b^c$", "ferns \\ mosses"]
)
def test_names_are_no_formulas(tmp_path: Path, name: str) -> None:
    """Guards against a picture that fails on a bank note, and against names in italics."""
    drawn(tmp_path / "a.png", [name], title=name)


def test_line_breaks_and_control_characters() -> None:
    """Guards against labels over several lines, over other boxes."""
    assert written("mug\n large\t ") == "mug large"
    assert written("杯 run") == "\N{REPLACEMENT CHARACTER} run"


def test_run_names_in_curves(tmp_path: Path) -> None:
    """Guards the other pictures: folders may be called anything, too."""
    history = [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_training_curves({"杯子": history, UNUSUAL: history, "$a_b$": history}, tmp_path / "a.png")
