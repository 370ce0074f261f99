"""YOLO data sets: `data.yaml` (or `classes.txt`), and a text file of labels for each image.

A line of labels is `class x y width height`, the box's centre and size as fractions of the image as it is seen
upright, or `class x1 y1 x2 y2 ...`, a polygon, of which the box around it is taken. Classes count from 0. An image
without labels shows none of them.
"""

import logging
import math
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from d3etr_hf.configurations import read_yaml_file
from d3etr_hf.data.coco_folders import SPLITS
from d3etr_hf.data.converted import images_below, load_converted, relative
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.image_files import check_image_files, check_inside
from d3etr_hf.data.splits import Source
from d3etr_hf.data.upright_size import SIZE_OF_BROKEN, upright_size
from d3etr_hf.errors import ConfigurationError, DatasetError, quoted
from d3etr_hf.files import regular_file

logger = logging.getLogger(__name__)

NAME_FILES = ("classes.txt", "obj.names", "names.txt")
USUAL_STEMS = ("data", "dataset")
MOST_BYTES_OF_YAML = 1_000_000  # that are looked at to tell what it is
HAS_IMAGES = re.compile(rb"^(\xef\xbb\xbf)?(train|val|test|path|nc)\s*:", re.MULTILINE)
HAS_NAMES = re.compile(rb"^(\xef\xbb\xbf)?names\s*:", re.MULTILINE)  # after the mark that Windows writes
MOST_BYTES = 10_000_000  # of one image's labels
LARGEST = 2  # a coordinate beyond it is no fraction, of a box that leaves its image a little


@dataclass(frozen=True)
class YoloFolder:
    """A YOLO data set.

    Attributes:
        folder: that the user named.
        base: that the entries of `data.yaml` are relative to.
        class_names: in order, from class 0.
        splits: by name the folders of images, or text files that list images.
        keypoints: numbers after the box in each line, which are passed over.
        absent: by name, why a split that `data.yaml` lists cannot be read.
    """

    folder: Path
    base: Path
    class_names: list[str]
    splits: dict[str, list[Path]]
    keypoints: int = 0
    absent: dict[str, str] = field(default_factory=dict)


def find_yolo(path: Path) -> YoloFolder | None:
    """The YOLO data set in a folder, or of a `data.yaml`; None if there is none.

    Raises:
        DatasetError: there is one that cannot be read: no names, several files of names, or missing folders.
    """
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    files = [file for file in files if _is_data_yaml(file, certain=file == path)]
    usual = [file for file in files if file.stem in USUAL_STEMS]
    if len(usual or files) > 1:
        raise DatasetError(
            f"{folder}: {', '.join(file.name for file in usual or files)} each list names of classes: give the right "
            f"one, for example data_folder {(usual or files)[0]}."
        )
    if files:
        return _from_yaml(folder, (usual or files)[0])
    for name in NAME_FILES:
        if (folder / name).is_file() and (splits := _usual_splits(folder)):
            return YoloFolder(folder, folder, _names_in(folder / name), splits)
    return None


def _is_data_yaml(file: Path, certain: bool) -> bool:
    """Whether a YAML file lists classes and images; `names` suffices where the file, or its name, says it is one."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(MOST_BYTES_OF_YAML)
    listed = certain or file.stem in USUAL_STEMS or (file.parent / "labels").is_dir() or HAS_IMAGES.search(head)
    return bool(listed and HAS_NAMES.search(head))


def _from_yaml(folder: Path, file: Path) -> YoloFolder:
    try:
        content = read_yaml_file(file)
    except ConfigurationError as error:
        raise DatasetError(f"{error}: it should name the classes of a YOLO data set") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: must hold 'key: value' lines, holds a {type(content).__name__}")
    names = _class_names(content, file)
    base = folder
    given = content.get("path")
    if isinstance(given, str) and "\0" not in given and os.path.isdir(folder / given):
        base = folder / given
    splits, absent = {}, {}
    for split in SPLITS:
        entries = content.get(split)
        if entries:
            entries = entries if isinstance(entries, list) else [entries]
            try:
                splits[split] = [_place(entry, split, base, folder, file) for entry in entries]
            except DatasetError as error:  # of a split that nobody may ask for
                absent[split] = str(error)
    if absent and not splits:
        raise DatasetError(next(iter(absent.values())))
    splits = splits or _usual_splits(base)
    if not splits:
        raise DatasetError(
            f"{file}: names no images: add `train` and `val`, the folders of images, for example images/train."
        )
    shape = content.get("kpt_shape")
    if shape is not None and not (isinstance(shape, list) and all(type(each) is int and each > 0 for each in shape)):
        raise DatasetError(
            f"{file}: `kpt_shape` is {quoted(shape)}: give the number of key points and of numbers of each, for "
            "example [17, 3], or leave it out."
        )
    return YoloFolder(folder, base, names, splits, math.prod(shape) if shape else 0, absent)


def _class_names(content: dict, file: Path) -> list[str]:
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        if sorted(names, key=repr) != sorted(range(len(names)), key=repr):
            raise DatasetError(f"{file}: the keys of `names` are {quoted(list(names))}: number the classes from 0.")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int, float) for name in names):
        raise DatasetError(f"{file}: `names` is {quoted(names)}: list the name of each class.")
    if count is not None and count != len(names):
        raise DatasetError(f"{file}: `nc` is {quoted(count)}, but there are {len(names)} `names`: make them agree.")
    return [str(name) for name in names]


def _names_in(file: Path) -> list[str]:
    try:
        lines = regular_file(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: the names of the classes cannot be read ({error}): write one a line.") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DatasetError(f"{file}: holds no names of classes: write one a line.")
    return names


def _place(entry: object, split: str, base: Path, folder: Path, file: Path) -> Path:
    """Where an entry of `data.yaml` is: Roboflow writes ../train/images for what lies beside the file."""
    if not isinstance(entry, str) or "\0" in entry:
        raise DatasetError(f"{file}: `{split}` is {quoted(entry)}: name a folder of images.")
    entry = entry.replace("\\", "/")
    inside = re.sub(r"^(\.\./)+", "", entry)
    candidates = [folder / inside, base / entry, folder / entry] if inside != entry else [base / entry, folder / entry]
    # the folder that the user named goes before what else of that name is on this machine
    for candidate in sorted(candidates, key=lambda each: os.path.isabs(relative(each, folder))):
        if os.path.exists(candidate):  # which is false, not an error, of a name that no file can have
            return candidate
    looked = dict.fromkeys(quoted(os.path.normpath(candidate)) for candidate in candidates)
    raise DatasetError(
        f"{file}: `{split}` is {quoted(entry)}, which is not there; looked for {' and '.join(looked)}: correct the "
        "entry, or `path`."
    )


def _usual_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of a folder that no `data.yaml` describes: its image folders that have labels."""
    for pattern in ("images/{}", "{}/images", "{}"):
        found = {split: [folder / pattern.format(split)] for split in SPLITS}
        found = {split: paths for split, paths in found.items() if paths[0].is_dir()}
        if found:
            return found
    for images, labels in (("images", "labels"), (".", ".")):
        if (folder / images).is_dir() and any((folder / labels).glob("*.txt")) and images_below(folder / images):
            return {"train": [folder / images]}
    return {}


def yolo_source(yolo: YoloFolder, anywhere: bool) -> Source:
    """The data set's splits; anywhere: whether files may lie outside of the folder that the user named."""
    name = Path(os.path.abspath(yolo.folder)).name
    return Source(
        str(yolo.folder),
        {split: partial(load_yolo_split, yolo, split, f"{name}/{split}", anywhere) for split in yolo.splits},
        yolo.absent,
    )


def load_yolo_split(yolo: YoloFolder, split: str, name: str, anywhere: bool = False) -> DetectionDataset:
    """Reads and checks one split; its category ids are YOLO's classes, and its images are numbered from 1.

    Args:
        yolo: the data set.
        split: one of its splits.
        name: for messages.
        anywhere: whether files may lie outside of the folder that the user named.

    Raises:
        DatasetError: files are missing or elsewhere, or a line is no label; or as `load_coco_split`.
    """
    # not those that `data.yaml` names, which somebody else may have written
    roots = None if anywhere else [yolo.folder]
    check_inside([str(place) for place in yolo.splits[split]], roots, f"{yolo.folder}, split {split}")
    images = [image for place in yolo.splits[split] for image in _images_at(place, yolo)]
    source = f"{yolo.folder}, split {split}"
    if not images:
        looked = ", ".join(quoted(str(place)) for place in yolo.splits[split])
        raise DatasetError(f"{source}: no images in {looked}: add them, or correct `{split}` in the YAML file.")
    check_image_files([str(image) for image in images], roots, source)
    labels = {image: path for image in images if (path := _labels_of(image, yolo)) is not None}
    if not labels:
        tried = ", ".join(quoted(str(path)) for path in _label_candidates(images[0], yolo))
        raise DatasetError(f"{source}: none of {len(images)} images has labels; looked for {tried} and the like.")
    if len(labels) < len(images):
        logger.info(
            "%s: %d of %d images have no labels, and count as empty", source, len(images) - len(labels), len(images)
        )
    check_image_files([str(path) for path in labels.values()], roots, source, what="label files")
    coco: dict = {"images": [], "annotations": []}
    coco["categories"] = [{"id": index, "name": class_name} for index, class_name in enumerate(yolo.class_names)]
    for image_id, image in enumerate(images, 1):
        labelled = read_labels(labels[image], yolo) if image in labels else []
        size = upright_size(image)
        width, height = size or SIZE_OF_BROKEN
        entry = {"id": image_id, "file_name": relative(image, yolo.folder), "width": width, "height": height}
        coco["images"].append(entry)
        for category_id, box in labelled if size else ():
            x, y, w, h = box[0] * width, box[1] * height, box[2] * width, box[3] * height
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": category_id}
            coco["annotations"].append({**annotation, "bbox": [x, y, w, h], "area": abs(w * h), "iscrowd": 0})
    return load_converted(coco, yolo.folder, name, source, roots)


def _images_at(place: Path, yolo: YoloFolder) -> list[Path]:
    """The images in a folder, or that a text file lists, relative to it or to the data set."""
    if place.is_dir():
        return images_below(place)
    found = []
    for line in _text_of(place).splitlines():
        if line := line.strip().replace("\\", "/"):
            beside = place.parent / line
            found.append(beside if line.startswith("./") or os.path.isfile(beside) else yolo.base / line)
    return found


def _label_candidates(image: Path, yolo: YoloFolder) -> list[Path]:
    """`labels` in the place of the last `images` below the data set's folder, or beside the image."""
    inside = relative(image, yolo.base)
    parts = list(Path(inside).with_suffix(".txt").parts)
    beside = yolo.base / Path(*parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        return [beside]
    parts[places[-1]] = "labels"
    return [yolo.base / Path(*parts), beside]


def _labels_of(image: Path, yolo: YoloFolder) -> Path | None:
    return next((path for path in _label_candidates(image, yolo) if os.path.lexists(path)), None)


def _text_of(path: Path) -> str:
    try:
        with regular_file(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DatasetError(f"{path}: larger than {MOST_BYTES // 10**6} MB: is this the right file?")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text ({error}): write it anew.") from None


def read_labels(path: Path, yolo: YoloFolder) -> list[tuple[int, tuple[float, float, float, float]]]:
    """The class and the box, xywh as fractions of the image, of each line of a file of labels.

    Raises:
        DatasetError: a line is no label; the message names file and line.
    """
    labels = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            raise DatasetError(f"{place}: {quoted(line)} holds something else than numbers.") from None
        category, numbers = values[0], values[1:]
        if not category.is_integer() or not 0 <= category < len(yolo.class_names):
            raise DatasetError(
                f"{place}: class {quoted(line.split()[0])} is none of 0 to {len(yolo.class_names) - 1}, which have "
                "names: correct it, or add its name."
            )
        box = numbers[:4] if len(numbers) == 4 + yolo.keypoints else None
        if box is None and (len(numbers) < 6 or len(numbers) % 2):
            raise DatasetError(
                f"{place}: {len(values)} numbers are neither a box (class x y width height) nor a polygon (class and "
                "at least three points): correct the line."
            )
        if not all(map(math.isfinite, numbers)) or max(map(abs, box or numbers)) > LARGEST:
            raise DatasetError(
                f"{place}: {quoted(line)} holds no fractions of the image, from 0 to 1: divide pixels by the image's "
                "width and height."
            )
        labels.append((int(category), _of_box(box) if box is not None else _of_polygon(numbers)))
    return labels


def _of_box(box: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x - width / 2, y - height / 2, width, height


def _of_polygon(numbers: list[float]) -> tuple[float, float, float, float]:
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
