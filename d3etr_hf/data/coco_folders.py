"""Where annotations in COCO format, and their images, lie in a folder: of COCO, Roboflow, CVAT and Label Studio."""

from pathlib import Path

from d3etr_hf.errors import DatasetError

SPLITS = ("train", "val", "valid", "validation", "dev", "test")
MOST_BYTES = 1_000_000  # that are looked at to tell what a file is
# Exports without splits: the annotations, and where their images may be. They are called "train".
WITHOUT_SPLITS = {
    "_annotations.coco.json": ["."],
    "result.json": ["."],
    "annotations/instances_default.json": ["images/default", "images"],
}


def layouts(split: str) -> dict[str, list[str]]:
    """The annotation files that a split may have, each with the folders that its images may be in."""
    return {
        f"annotations/{split}.json": [split, f"images/{split}", "images"],
        f"annotations/instances_{split}2017.json": [f"{split}2017", f"images/{split}2017", "images"],
        f"annotations/instances_{split}.json": [f"images/{split}", split, "images"],
        f"{split}/_annotations.coco.json": [split],
    }


def find_coco_split(folder: str | Path, split: str) -> tuple[Path, Path]:
    """Finds a split's annotation file and image folder.

    `annotations/{split}.json` with `{split}/`, `images/{split}/` or `images/`; else COCO's own
    `annotations/instances_{split}2017.json` with `{split}2017/`, `images/{split}2017/` or `images/`; else CVAT's
    `annotations/instances_{split}.json`; else Roboflow's `{split}/_annotations.coco.json` beside the images.

    Args:
        folder: of the data set.
        split: for example `train` or `val`.

    Raises:
        DatasetError: one of the two is not there; the message lists what was looked for.
    """
    found = _found(Path(folder), layouts(split), split)
    if found is None:
        raise DatasetError(
            f"{folder}: no annotations of the {split} split; looked for {', '.join(layouts(split))}: add one, or name "
            f"the files by `{split}_annotations` and `{split}_images`."
        )
    return found


def find_coco_splits(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Annotation file and image folder of every split that is there, by its name; empty if none is.

    Raises:
        DatasetError: annotations are there, but no image folder of any of them.
    """
    splits, absent = _all_found(folder)
    if absent and not splits:
        raise DatasetError(next(iter(absent.values())))
    if not splits:
        # other tools call files result.json, too
        candidates = {
            file: images
            for file, images in WITHOUT_SPLITS.items()
            if file != "result.json" or _lists_images(folder / file)
        }
        places = _found(folder, candidates, "train")
        splits = {} if places is None else {"train": places}
    return splits


def splits_without_images(folder: Path) -> dict[str, str]:
    """By name, what an error message says of a split whose annotations are there and whose images are not."""
    return _all_found(folder)[1]


def _all_found(folder: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    splits, absent = {}, {}
    for split in SPLITS:
        try:
            if (places := _found(folder, layouts(split), split)) is not None:
                splits[split] = places
        except DatasetError as error:  # of a split that nobody may ask for
            absent[split] = str(error)
    return splits, absent


def _lists_images(file: Path) -> bool:
    """Whether the beginning of a JSON file names `images`."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return b'"images"' in opened.read(MOST_BYTES)


def _found(folder: Path, candidates: dict[str, list[str]], split: str) -> tuple[Path, Path] | None:
    for annotations, image_folders in candidates.items():
        if (folder / annotations).is_file():
            for images in image_folders:
                if (folder / images).is_dir():
                    return folder / annotations, folder / images
            raise DatasetError(
                f"{folder}: {annotations} is there, but none of the image folders {', '.join(image_folders)}: add "
                f"one, or name the files by `{split}_annotations` and `{split}_images`."
            )
    return None
