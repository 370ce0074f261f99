"""COCO-format splits: an annotation JSON and a folder of images.

The checked boxes are kept as an Arrow file in the `datasets` cache, named by the *content* of the JSON: a second
start, or a second process, maps the file into memory instead of parsing and checking the JSON again, and a changed
JSON can never meet an old file. Nothing is written into the data folder.
"""

import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PureWindowsPath

import datasets
import pyarrow as pa

from d3etr_hf.data.checking import CheckedSplit, check_coco
from d3etr_hf.data.coco_fields import without_nulls
from d3etr_hf.data.coco_forms import usual_form
from d3etr_hf.data.dataset import BOX_FEATURES, DetectionDataset
from d3etr_hf.data.image_files import caches, check_image_files
from d3etr_hf.errors import DatasetError, one_line
from d3etr_hf.files import regular_file, sha256_of

logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when the checks or the rows change.
READER_VERSION = 6
SUMMARY_KEY = b"d3etr_hf"
COCO_FEATURES = datasets.Features({"image_path": datasets.Value("string"), **BOX_FEATURES})


def load_coco_split(
    annotations: str | Path,
    images: str | Path,
    name: str | None = None,
    cache_dir: str | Path | None = None,
    roots: Iterable[str | Path] | None = (),
    source: str | None = None,
) -> DetectionDataset:
    """Reads and checks one split in COCO format, as it is or as annotation tools write it (see `usual_form`).

    Boxes that had to be dropped or clipped, or that look like other units, are told in one warning.

    Args:
        annotations: COCO detection JSON.
        images: folder that `file_name` is relative to.
        name: for messages; by default the annotation file's name.
        cache_dir: where the Arrow file is kept; by default `d3etr_hf` in the cache of `datasets`.
        roots: folders beside `images` and the caches of Hugging Face that image files may lie in, links followed; None
            for anywhere.
        source: what messages call the annotations; by default their path.

    Raises:
        DatasetError: see `check_coco`; or the JSON is malformed, or image files are missing, elsewhere or no files.
    """
    annotations, images = Path(annotations).absolute(), Path(images).absolute()
    source = source or str(annotations)
    cache_dir = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "d3etr_hf")
    digest = hashlib.sha256(_content(annotations)).hexdigest()
    rows, summary = _rows_of(
        annotations, images, source, cache_dir / f"{_cache_key(digest, annotations, images)}.arrow"
    )
    for note in summary["notes"]:
        logger.info("%s: %s.", source, note)
    inside = None if roots is None else [images, *roots, *caches()]
    check_image_files(rows["image_path"], inside, source, images)
    if summary["report"]:
        warnings.warn(summary["report"], stacklevel=2)
    return DetectionDataset(
        name=name or annotations.stem,
        class_names=summary["class_names"],
        category_ids=summary["category_ids"],
        rows=rows,
        load_ground_truth=partial(_ground_truth, annotations),
        annotations_digest=digest,
    )


def _rows_of(annotations: Path, images: Path, source: str, rows_file: Path) -> tuple[datasets.Dataset, dict]:
    """The checked rows and their summary, from the cache where they are there."""
    kept = _read_rows(rows_file)
    if kept is None:
        coco, notes = usual_form(read_coco(annotations))
        checked = check_coco(coco, source=source, file_names=True)
        _write_rows(checked, [image_path(images, image["file_name"]) for image in checked.images], notes, rows_file)
        kept = _read_rows(rows_file)
    if kept is None:
        raise DatasetError(f"{rows_file}: cannot be read although it has just been written: check this disk.")
    return kept


def image_path(images: Path, file_name: str) -> str:
    r"""Where the image of a `file_name` is: one of Windows, such as `images\1.png`, means the same with slashes.

    Unless a file of just that name is there, as some archives leave it.
    """
    path = str(images / file_name)
    if "\\" not in file_name or (os.path.dirname(file_name) == "" and os.path.lexists(path)):
        return path
    return str(images / PureWindowsPath(file_name).as_posix())


def read_coco(annotations: Path) -> dict:
    """The content of a COCO JSON, unchecked.

    Raises:
        DatasetError: the file is missing or is not JSON.
    """
    content = _content(annotations)
    try:
        return json.loads(content)
    except ValueError as error:
        raise DatasetError(f"{annotations}: not a JSON file ({one_line(error)}): write it anew.") from error
    except RecursionError:
        raise DatasetError(f"{annotations}: lists or objects are nested too deeply: write it anew.") from None


def _content(annotations: Path) -> bytes:
    try:
        return regular_file(annotations).read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{annotations}: the annotations cannot be read ({error.strerror}): check the path."
        ) from error


def _ground_truth(annotations: Path) -> dict:
    coco, _ = usual_form(read_coco(annotations))
    return without_nulls(coco)


def _cache_key(digest: str, annotations: Path, images: Path) -> str:
    key = [digest, READER_VERSION, str(annotations), str(images)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _write_rows(checked: CheckedSplit, image_paths: list[str], notes: list[str], rows_file: Path) -> None:
    rows = datasets.Dataset.from_dict({"image_path": image_paths, **checked.columns()}, features=COCO_FEATURES)
    summary = {
        "class_names": checked.class_names,
        "category_ids": checked.category_ids,
        "report": checked.report,
        "notes": notes,
    }
    schema = rows.data.schema
    table = rows.data.table.replace_schema_metadata({**schema.metadata, SUMMARY_KEY: json.dumps(summary)})
    try:
        rows_file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved, so that another process sees the whole file or none.
        with tempfile.TemporaryDirectory(dir=rows_file.parent) as folder:
            unfinished = os.path.join(folder, rows_file.name)
            with pa.OSFile(unfinished, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            digest = Path(folder) / "digest"
            digest.write_text(sha256_of(Path(unfinished)), encoding="utf-8")
            os.replace(digest, _digest_file(rows_file))
            os.replace(unfinished, rows_file)
    except OSError as error:
        raise DatasetError(
            f"{rows_file}: cannot be written ({one_line(error)}): make room there, or set HF_DATASETS_CACHE."
        ) from error


def _read_rows(rows_file: Path) -> tuple[datasets.Dataset, dict] | None:
    """The rows and the summary that were written; None where there are none, or where the file is damaged."""
    try:
        digest = sha256_of(regular_file(rows_file))
        if _digest_file(rows_file).read_text(encoding="utf-8") != digest:
            logger.warning("%s is not as it was written, and is made anew", rows_file)
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s), and is made anew", rows_file, one_line(error))
        return None
    with pa.memory_map(str(rows_file)) as file, pa.ipc.open_stream(file) as reader:
        summary = json.loads(reader.schema.metadata[SUMMARY_KEY])
    return datasets.Dataset.from_file(str(rows_file)), summary


def _digest_file(rows_file: Path) -> Path:
    """Where the hash of the rows' file is kept: bytes that are damaged can look like other rows."""
    return rows_file.with_suffix(".sha256")
