"""Which image files are meant by what a user names: files, folders and patterns."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from d3etr_hf.errors import DatasetError, quoted

MOST_NAMED = 3


def find_images(named: str | Path | Iterable[str | Path]) -> list[Path]:
    """The image files that are named, each once, in the order in which they are named.

    A file is taken whatever it is called. Of a folder, and of a pattern with `*`, `?`, `[...]` or `**`, those files
    count whose names end as images' do, in order of their names; subfolders and hidden files are passed over.

    Args:
        named: one or several files, folders or patterns.

    Raises:
        DatasetError: one of them names no image; the message names it.
    """
    places = [named] if isinstance(named, str | Path) else list(named)
    if not places:
        raise DatasetError("no image is named: give files, folders or patterns such as 'photos/*.jpg'")
    found: dict[Path, None] = {}
    for place in places:
        found |= dict.fromkeys(_images_at(str(place)))
    return list(found)


def _images_at(place: str) -> list[Path]:
    path = Path(os.path.expanduser(place))
    if os.path.isdir(path):
        return _image_files(path.iterdir(), f"the folder {quoted(place)} holds", _subfolders(path))
    if os.path.exists(path):
        return [path]
    if "://" in place:
        raise DatasetError(f"{quoted(place)} is an address: download the image, and name its file")
    if glob.has_magic(place):
        matches = map(Path, glob.glob(str(path), recursive=True))
        return _image_files(matches, f"the pattern {quoted(place)} matches", "")
    raise DatasetError(f"{quoted(place)}: there is no such file or folder")


def _image_files(paths: Iterable[Path], what: str, hint: str) -> list[Path]:
    endings = set(Image.registered_extensions())
    files = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in endings]
    if not images:
        others = ", ".join(quoted(path.name) for path in files[:MOST_NAMED])
        others += ", ..." if len(files) > MOST_NAMED else ""
        found = f" but {len(files)} other files ({others})" if files else ""
        raise DatasetError(f"{what} no file that ends as an image's does (.jpg, .png, ...){found}{hint}")
    return images


def _subfolders(path: Path) -> str:
    """A hint where images may lie deeper."""
    folders = any(each.is_dir() for each in path.iterdir())
    return f"; for those in its subfolders give the pattern {str(path / '**' / '*')!r}" if folders else ""
