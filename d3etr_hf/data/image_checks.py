"""What is wrong with the images of a data set, told together and before training."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence

from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.duplicates import (
    check_files_named_twice,
    describe_contradictions,
    describe_shared,
    same_content,
)
from d3etr_hf.data.image_headers import ImageHeader, read_headers
from d3etr_hf.data.images import REMEDIES
from d3etr_hf.errors import DatasetError

NAMED = 3  # images of a kind that a message names


Decide = Callable[[Callable[[], list[list[int]]]], list[list[int]]]


def check_images(
    splits: Sequence[DetectionDataset], skip_broken: bool = False, decide: Decide = lambda find: find()
) -> list[DetectionDataset]:
    """Looks at the headers of all images, and for images that are there more than once.

    Where broken images are left out every image is decoded, so that none is met in training.

    Args:
        splits: the training and the validation split, or one of them.
        skip_broken: leave out what cannot be used, with one warning, instead of refusing it.
        decide: calls what looks at the images, and returns what it does; where several processes read the data, on one
            of them for all, such as `on_main_process`.

    Returns:
        The splits, without the images that were left out.

    Raises:
        DatasetError: images cannot be read, are of another size than annotated or hold pixels of more than 8 bits; all
            of them are counted, by split and kind, and the first are named. Or a file is listed under several ids with
            different boxes, or no image is left of a split.
    """
    left_out = decide(lambda: _broken_rows(splits, skip_broken))
    return [
        split.select(sorted(set(range(len(split))).difference(broken))) if broken else split
        for split, broken in zip(splits, left_out, strict=True)
    ]


def _broken_rows(splits: Sequence[DetectionDataset], skip_broken: bool) -> list[list[int]]:
    """The rows of each split that are to be left out; what else is to be known is warned of."""
    told = [check_files_named_twice(split) for split in splits]
    headers = [read_headers(split, decode_all=skip_broken) for split in splits]
    broken = [[index for index, header in enumerate(found) if header.fault is not None] for found in headers]
    if faults := describe_faults(splits, headers):
        if not skip_broken:
            raise DatasetError(f"{faults} Or pass --skip_broken_images true to leave them out.")
        told.append(f"Left out: {faults}")
        for split, rows in zip(splits, broken, strict=True):
            if len(rows) == len(split):
                raise DatasetError(
                    f"{split.name}: no image is left that can be used: check that these are the right files."
                )
    told += describe_notes(splits, headers)
    for message in filter(None, told):
        warnings.warn(message, stacklevel=2)
    return broken


def describe_faults(splits: Sequence[DetectionDataset], headers: Sequence[Sequence[ImageHeader]]) -> str:
    """All faults of images: counts by split and kind, the first names, and what to do; empty if there are none."""
    parts, kinds = [], []
    for split, found in zip(splits, headers, strict=True):
        by_kind = defaultdict(list)
        for index, header in enumerate(found):
            if header.fault is not None:
                by_kind[header.fault.kind].append((index, header.fault))
        for kind, faults in by_kind.items():
            names = [f"{split.place_of(split.rows[index])} ({fault.what})" for index, fault in faults[:NAMED]]
            more = ", ..." if len(faults) > NAMED else ""
            parts.append(f"{split.name}: {len(faults)} of {len(found)} images are {kind}: {', '.join(names)}{more}")
            kinds += [kind] if kind not in kinds else []
    if not parts:
        return ""
    remedies = " ".join(f"If {kind}: {REMEDIES[kind]}." for kind in kinds)
    return f"{'; '.join(parts)}. {remedies}"


def describe_notes(splits: Sequence[DetectionDataset], headers: Sequence[Sequence[ImageHeader]]) -> list[str]:
    """What is to be known of images that can be used: a sentence each, if there is any."""
    groups = same_content(splits, headers)
    notes = [describe_contradictions(split, groups, number) for number, split in enumerate(splits)]
    if len(splits) == 2:
        notes.append(describe_shared(*splits, groups))
    for split, found in zip(splits, headers, strict=True):
        unturned = [index for index, header in enumerate(found) if header.unturned]
        if unturned:
            first = split.place_of(split.rows[unturned[0]])
            notes.append(
                f"{split.name}: {len(unturned)} of {len(split)} images are annotated as they are stored, though their "
                f"EXIF orientation turns them, the first {first}: they are trained on as annotated, but Transformers' "
                "pipelines will turn such images; save them without the orientation."
            )
    return [note for note in notes if note]
