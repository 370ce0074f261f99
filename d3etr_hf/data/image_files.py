"""Which image files may be read: files, inside the folders that were named.

A data set that somebody else made must not have other files of this machine read: the rule is the same for the
`file_name` of a COCO file, for a path in a Parquet row, for `..`, and for links.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import huggingface_hub.constants

from d3etr_hf.errors import DatasetError, quoted
from d3etr_hf.files import regular_file

MOST_FILES = 100_000  # that are looked at to find one by its name


def caches() -> list[Path]:
    """The folders in which Hugging Face's libraries keep what was downloaded."""
    return [Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HUB_CACHE)]


def check_image_files(
    paths: Iterable[str],
    roots: Iterable[str | Path] | None,
    source: str,
    images: str | Path | None = None,
    what: str = "images",
) -> None:
    """Makes sure that all images are there, are files, and lie in one of the roots, links followed.

    Each folder is listed once: on a network file system that is much faster than asking for every file. A path is only
    looked at if its folder is inside.

    Args:
        paths: of the images.
        roots: folders that they may lie in; None for anywhere.
        source: what an error message calls the data set.
        images: folder in which to look for a file of the first missing one's name, which the message then tells.
        what: what an error message calls the files.

    Raises:
        DatasetError: some are missing, no files, or elsewhere; the message counts them and names the first.
    """
    inside = _insides(roots)
    listings: dict[str, dict[str, os.DirEntry] | None] = {}
    faults: dict[str, list[str]] = {"outside": [], "missing": [], "no file": []}
    for path in paths:
        if "\0" in path:  # which no file's name has
            faults["missing"].append(path)
            continue
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = _listing(folder, source) if _lies_in(folder, inside) else None
        if fault := _fault(path, name, listings[folder], inside):
            faults[fault].append(path)
    _refuse(faults, source, images, what)


def check_inside(paths: Iterable[str], roots: Iterable[str | Path] | None, source: str) -> None:
    """Makes sure that folders or files lie in one of the roots, links followed, before anything is read there.

    Raises:
        DatasetError: some do not; the message counts them and names the first.
    """
    inside = _insides(roots)
    outside = [path for path in paths if not _lies_in(path, inside)]
    _refuse({"outside": outside, "missing": [], "no file": []}, source, None, "folders of images")


def _insides(roots: Iterable[str | Path] | None) -> tuple[str, ...] | None:
    return None if roots is None else tuple(os.path.join(os.path.realpath(root), "") for root in roots)


def _fault(path: str, name: str, listing: dict[str, os.DirEntry] | None, inside: tuple[str, ...] | None) -> str | None:
    if listing is None:
        return "outside"
    entry = listing.get(name)
    if entry is None:
        return "missing"
    if entry.is_symlink() and not _lies_in(path, inside):
        return "outside"
    if entry.is_file(follow_symlinks=False):
        return None
    try:
        regular_file(path)
    except FileNotFoundError:  # a link to nothing
        return "missing"
    except OSError:
        return "no file"
    return None


def _lies_in(path: str, inside: tuple[str, ...] | None) -> bool:
    if inside is None:
        return True
    return os.path.join(os.path.realpath(path), "").startswith(inside)


def _listing(folder: str, source: str) -> dict[str, os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DatasetError(
            f"{source}: the image folder {quoted(folder)} cannot be listed ({error.strerror}): check the path."
        ) from error


def _refuse(faults: dict[str, list[str]], source: str, images: str | Path | None, what: str) -> None:
    lost = [*faults["outside"], *faults["missing"]]
    hint = _same_name(lost[0], images) if lost and images is not None else ""
    if outside := faults["outside"]:
        raise DatasetError(
            f"{source}: {len(outside)} of its {what} lie outside the folders that were named, the first "
            f"{quoted(outside[0])}, which leads to {quoted(os.path.realpath(outside[0]))}: move them into the image "
            f"folder, or pass --allow_images_elsewhere true if you trust who made the data{hint}."
        )
    if missing := faults["missing"]:
        raise DatasetError(
            f"{source}: {len(missing)} of its {what} are missing, the first {', '.join(map(quoted, missing[:3]))}: "
            f"add the files, or check the image folder{hint}."
        )
    if others := faults["no file"]:
        raise DatasetError(
            f"{source}: {len(others)} of its {what} are folders, named pipes or devices instead of files, the first "
            f"{quoted(others[0])}: put files in their place."
        )


def _same_name(path: str, images: str | Path) -> str:
    """Where a file of that name lies after all, as an addition to a message; looks at the first 100,000 only."""
    name, seen = os.path.basename(path), 0
    for place, folders, names in os.walk(images):
        folders[:] = sorted(folder for folder in folders if folder[0] != ".")
        if name.casefold() in map(str.casefold, names):
            found = next(each for each in names if each.casefold() == name.casefold())
            there = os.path.relpath(os.path.join(place, found), images)
            return f"; there is {quoted(there)} in {quoted(str(images))}: `file_name` may say another folder"
        seen += len(names)
        if seen > MOST_FILES:
            break
    return ""
