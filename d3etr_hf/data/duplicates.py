"""Images that are there more than once: one file under several image ids, the same content twice, in both splits."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

from d3etr_hf.data.dataset import DetectionDataset, source_of
from d3etr_hf.data.image_headers import ImageHeader
from d3etr_hf.errors import DatasetError
from d3etr_hf.files import blocks_of

Place = tuple[int, int]  # which of the splits, and the index of the row


def check_files_named_twice(dataset: DetectionDataset) -> str:
    """Refuses files that are listed under several image ids with different boxes.

    Returns:
        Of those listed several times with the same boxes, the sentence of a warning; empty if there are none.

    Raises:
        DatasetError: the same pixels have different boxes; the message has the count and the first file.
    """
    if "image_path" not in dataset.rows.column_names:
        return ""
    indices = defaultdict(list)
    for index, path in enumerate(dataset.rows["image_path"][:]):
        indices[path].append(index)
    repeated = {path: rows for path, rows in indices.items() if len(rows) > 1}
    different = {path: rows for path, rows in repeated.items() if len(_objects_of(dataset, rows)) > 1}
    if different:
        raise DatasetError(
            f"{dataset.name}: {_several(different, dataset)} with different boxes: the same pixels would be trained "
            "with each of them. Give every image a file of its own (videos that are exported together often share "
            "names), or bring the annotations of one file together under one image id."
        )
    if repeated:
        return (
            f"{dataset.name}: {_several(repeated, dataset)} with the same boxes: each is trained on and counted that "
            "often; leave one entry of each."
        )
    return ""


def _several(files: dict[str, list[int]], dataset: DetectionDataset) -> str:
    path, rows = next(iter(files.items()))
    ids = ", ".join(str(dataset.rows[row]["image_id"]) for row in rows[:3])
    found = "1 image file is" if len(files) == 1 else f"{len(files)} image files are"
    return f"{found} listed under several image ids, the first {path} (ids {ids}{', ...' if rows[3:] else ''}),"


def _objects_of(dataset: DetectionDataset, rows: Sequence[int]) -> set[str]:
    """The objects of rows, as text in an order of their own, each different one once."""
    columns = dataset.rows.select_columns(["boxes", "class_labels"])
    found = (columns[row] for row in rows)
    return {json.dumps(sorted(zip(row["class_labels"], row["boxes"], strict=True))) for row in found}


def same_content(splits: Sequence[DetectionDataset], headers: Sequence[Sequence[ImageHeader]]) -> list[list[Place]]:
    """Groups of at least two images that are the same file, or files of the same content, byte for byte.

    Args:
        splits: of one data set.
        headers: of `read_headers`, for each split; images with a fault are left aside.
    """
    candidates = defaultdict(list)
    for number, found in enumerate(headers):
        for index, header in enumerate(found):
            if header.fault is None:
                candidates[header.fingerprint].append((number, index))
    groups = []
    for places in candidates.values():
        if len(places) < 2:
            continue
        by_content = defaultdict(list)
        known: dict[str, str] = {}
        for number, index in places:
            by_content[_content_of(splits[number].rows[index], known)].append((number, index))
        groups += [group for group in by_content.values() if len(group) > 1]
    return groups


def _content_of(row: dict, known: dict[str, str]) -> str:
    """The hash of an image's content; `known` has those of files that were read already."""
    source = source_of(row)
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if source not in known:
        digest = hashlib.sha256()
        for block in blocks_of(source):
            digest.update(block)
        known[source] = digest.hexdigest()
    return known[source]


def describe_shared(train: DetectionDataset, val: DetectionDataset, groups: list[list[Place]]) -> str:
    """The sentence of a warning about images of both splits; empty if there are none.

    Args:
        train, val: the splits of `same_content`, in this order.
        groups: its result.
    """
    shared = [group for group in groups if {number for number, _ in group} == {0, 1}]
    count = sum(number == 1 for group in shared for number, _ in group)
    if not shared:
        return ""
    first = [next(index for number, index in shared[0] if number == split) for split in (0, 1)]
    names = [split.place_of(split.rows[index]) for split, index in zip((train, val), first, strict=True)]
    return (
        f"{count} of {len(val)} images of {val.name} are in {train.name} as well, the first {names[1]}, which is "
        f"{names[0]}: what is measured on images that were trained on says little; take them out of one of the two."
    )


def describe_contradictions(dataset: DetectionDataset, groups: list[list[Place]], number: int) -> str:
    """The sentence of a warning about images of one split with the same content and different boxes; or empty.

    Args:
        dataset: the split.
        groups: of `same_content`.
        number: which of the splits it was there.
    """
    own = [[index for split, index in group if split == number] for group in groups]
    different = [rows for rows in own if len(rows) > 1 and len(_objects_of(dataset, rows)) > 1]
    if not different:
        return ""
    names = [dataset.place_of(dataset.rows[index]) for index in different[0][:2]]
    images = "1 image is" if len(different) == 1 else f"{len(different)} images are"
    return (
        f"{dataset.name}: {images} there several times with different boxes, the first {names[0]} and {names[1]}, "
        "which have the same content: leave one of each, with all of its boxes."
    )
