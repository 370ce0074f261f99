"""Files, folders and patterns name images; what names none is refused."""

from pathlib import Path

import pytest

from d3etr_hf.data.image_lists import find_images
from d3etr_hf.errors import DatasetError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "more/c.jpeg", "more/deep/d.webp", "odd[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def found(named) -> list[str]:
    return [path.as_posix() for path in find_images(named)]


def test_each_image_once_in_the_order_named(folder):
    assert found(".") == ["a.png", "b.JPG", "odd[1].png"]
    assert found(["more", "a.png", "."]) == ["more/c.jpeg", "a.png", "b.JPG", "odd[1].png"]
    assert found("**/*") == ["a.png", "b.JPG", "more/c.jpeg", "more/deep/d.webp", "odd[1].png"]
    assert found("*.p*") == ["a.png", "odd[1].png"]
    assert found("odd[1].png") == ["odd[1].png"]  # a file, though it looks like a pattern
    assert found(["notes.txt"]) == ["notes.txt"]  # named, so it is taken to be an image
    assert found(folder / "a.png") == [f"{folder.as_posix()}/a.png"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([], "no image is named"),
        ("none.jpg", "'none.jpg': there is no such file or folder"),
        ("https://example.org/a.jpg", "is an address: download the image"),
        ("*.tiff", r"the pattern '\*.tiff' matches no file that ends as an image's does \(.jpg, .png, ...\)$"),
        ("*.txt", r"matches no file .* but 1 other files \('notes.txt'\)"),
        ("empty", r"the folder 'empty' holds no file .*\)$"),
        ("above", r"for those in its subfolders give the pattern 'above/\*\*/\*'"),
    ],
)
def test_what_names_no_image_is_refused(folder, named, message):
    Path("empty").mkdir()
    Path("above/below").mkdir(parents=True)
    with pytest.raises(DatasetError, match=message):
        find_images(named)
