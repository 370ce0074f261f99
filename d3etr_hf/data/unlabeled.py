"""Images without labels, which a teacher alone supervises: a folder of them, beside a labelled training split."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets

from d3etr_hf.data.coco import COCO_FEATURES
from d3etr_hf.data.coco_fields import is_text
from d3etr_hf.data.converted import images_below
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.duplicates import describe_shared, same_content
from d3etr_hf.data.image_checks import Decide, describe_faults
from d3etr_hf.data.image_files import check_image_files
from d3etr_hf.data.image_headers import THREADS, read_headers
from d3etr_hf.data.reading import require_place
from d3etr_hf.data.upright_size import SIZE_OF_BROKEN, upright_size
from d3etr_hf.errors import DatasetError, quoted

OPTION = "unlabeled_images"


def load_unlabeled(folder: str | Path, train: DetectionDataset, anywhere: bool = False) -> DetectionDataset:
    """The images in a folder and in those in it, hidden ones aside; none has been looked at but for its size.

    Args:
        folder: of the images.
        train: the labelled split, whose classes they have. Their ids are below all of its own, and below 0.
        anywhere: whether files may lie outside of the folder, as links lead there.

    Raises:
        DatasetError: there is no such folder or no image in it, or files are elsewhere, no files, or of names that are
            no text.
    """
    require_place(str(folder), OPTION)
    folder, source = Path(folder), f"{OPTION} {quoted(str(folder))}"
    paths = [str(path) for path in images_below(folder)]
    if not paths:
        raise DatasetError(f"{source}: there is no image in this folder, nor in those in it: name another one.")
    if unwritable := [path for path in paths if not is_text(path)]:
        raise DatasetError(
            f"{source}: {len(unwritable)} of its images have names that are no UTF-8, the first "
            f"{quoted(unwritable[0])}: rename them."
        )
    check_image_files(paths, None if anywhere else [folder], source)
    with ThreadPoolExecutor(THREADS) as threads:
        sizes = [size or SIZE_OF_BROKEN for size in threads.map(upright_size, paths)]
    lowest = min(0, *train.rows["image_id"][:])
    columns = {
        "image_path": [os.path.abspath(path) for path in paths],
        "image_id": [lowest - number for number in range(1, len(paths) + 1)],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "boxes": [[] for _ in paths],
        "class_labels": [[] for _ in paths],
    }
    return DetectionDataset(
        name=f"{Path(os.path.abspath(folder)).name}, unlabelled",
        class_names=train.class_names,
        category_ids=train.category_ids,
        rows=datasets.Dataset.from_dict(columns, features=COCO_FEATURES),
        load_ground_truth=dict,
        annotations_digest="",
    )


def check_unlabeled_images(
    unlabeled: DetectionDataset,
    train: DetectionDataset,
    val: DetectionDataset,
    skip_broken: bool = False,
    decide: Decide = lambda find: find(),
) -> DetectionDataset:
    """Without those that are in the training split, which have labels; the headers of all others are looked at.

    One warning tells what was left out, another of images that are in the validation split.

    Args:
        unlabeled: of `load_unlabeled`.
        train, val: the splits, whose images have been looked at.
        skip_broken, decide: as in `check_images`.

    Raises:
        DatasetError: images cannot be used, or none is left.
    """
    (left_out,) = decide(lambda: [_rows_left_out(unlabeled, train, val, skip_broken)])
    if not left_out:
        return unlabeled
    return unlabeled.select(sorted(set(range(len(unlabeled))).difference(left_out)))


def _rows_left_out(
    unlabeled: DetectionDataset, train: DetectionDataset, val: DetectionDataset, skip_broken: bool
) -> list[int]:
    """The rows that training does not take; what is to be known of them is warned of."""
    known = {os.path.realpath(path) for path in _paths_of(train)}
    named = [row for row, path in enumerate(_paths_of(unlabeled)) if os.path.realpath(path) in known]
    others = sorted(set(range(len(unlabeled))).difference(named))
    rest = unlabeled.select(others)  # whose files need not be compared byte by byte with those of their names
    # the splits have been looked at, and are not decoded once more
    headers = [read_headers(rest, decode_all=skip_broken), *map(read_headers, (val, train))]
    faults = describe_faults([rest], headers[:1])
    if faults and not skip_broken:
        raise DatasetError(f"{faults} Or pass --skip_broken_images true to leave them out.")
    groups = same_content([rest, val, train], headers)
    copies = [row for group in groups if any(of == 2 for of, _ in group) for of, row in group if of == 0]
    labeled = sorted([*named, *(others[row] for row in copies)])
    broken = [others[row] for row, header in enumerate(headers[0]) if header.fault is not None]
    if len({*labeled, *broken}) == len(unlabeled):
        raise DatasetError(
            f"{unlabeled.name}: no image is left that could be used without labels, since of {len(unlabeled)} "
            f"{len(labeled)} are in {train.name}, with their labels, and {len(broken)} cannot be used: name another "
            f"folder, or leave {OPTION} out."
        )
    told = [
        f"Left out: {faults}" if faults else "",
        _describe_labeled(unlabeled, train, len(labeled), len(unlabeled) - len({*labeled, *broken})),
        describe_shared(rest, val, [[place for place in group if place[0] != 2] for group in groups]),
    ]
    for message in filter(None, told):
        warnings.warn(message, stacklevel=2)
    return [*labeled, *broken]


def _paths_of(dataset: DetectionDataset) -> Sequence[str]:
    """The image files of a split; none of one that holds its images itself."""
    return dataset.rows["image_path"][:] if "image_path" in dataset.rows.column_names else []


def _describe_labeled(unlabeled: DetectionDataset, train: DetectionDataset, labeled: int, left: int) -> str:
    """The sentence about so many images that have labels after all, and how many are left; empty if there are none."""
    if not labeled:
        return ""
    return (
        f"{unlabeled.name}: {labeled} of {len(unlabeled)} images are in {train.name}, with their labels, and left out "
        f"here; {left} remain without labels."
    )
