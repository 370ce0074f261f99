"""Pascal VOC data sets: an XML file of annotations for each image.

Corners are those of VOC: the first and the last pixel of an object, counted from 1, so that `xmin` 1 and `xmax` 40 are
40 pixels from the left edge; where a tool counts from 0 a box comes out up to a pixel larger. Objects that are
`difficult` are crowd regions here: as in VOC's own evaluation they neither count nor are learned.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from xml.etree import ElementTree

from d3etr_hf.data.coco_folders import SPLITS
from d3etr_hf.data.converted import images_below, load_converted, relative
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.image_files import check_image_files
from d3etr_hf.data.splits import Source
from d3etr_hf.data.upright_size import SIZE_OF_BROKEN, upright_size
from d3etr_hf.errors import DatasetError, one_line, quoted
from d3etr_hf.files import regular_file

ANNOTATIONS, IMAGES = ("Annotations", "annotations"), ("JPEGImages", "images", "Images", ".")
LISTS = "ImageSets/Main"
LISTED = (*SPLITS, "trainval")
MOST_BYTES = 10_000_000  # of one image's annotations


@dataclass(frozen=True)
class VocObject:
    """An object: its class's name, its box xywh in pixels, and whether it is marked as difficult."""

    name: str
    box: list[float]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """What an XML file says; `size` is width and height in pixels, None where it names none."""

    file_name: str
    size: tuple[int, int] | None
    objects: list[VocObject]


@dataclass(frozen=True)
class VocFolder:
    """A Pascal VOC data set.

    Attributes:
        folder: that the user named.
        splits: by name the XML files, in order, and the folder of their images.
        anywhere: whether files may lie outside of the folder.
    """

    folder: Path
    splits: dict[str, tuple[list[Path], Path]]
    anywhere: bool = False

    @property
    def roots(self) -> list[Path] | None:
        """The folders in which files may lie; None for anywhere."""
        return None if self.anywhere else [self.folder]

    @cached_property
    def read(self) -> dict[Path, VocImage]:
        """What each XML file that is there says, of all splits: their classes are the same.

        Raises:
            DatasetError: a file is elsewhere, or cannot be read.
        """
        listed = dict.fromkeys(path for files, _ in self.splits.values() for path in files)
        paths = [path for path in listed if os.path.lexists(path)]  # lists may name what another archive holds
        check_image_files([str(path) for path in paths], self.roots, str(self.folder), what="annotation files")
        return {path: read_voc(path) for path in paths}

    @cached_property
    def class_names(self) -> list[str]:
        """Those of all splits, in alphabetical order."""
        return sorted({thing.name for image in self.read.values() for thing in image.objects})


def find_voc(folder: Path, anywhere: bool = False) -> VocFolder | None:
    """The Pascal VOC data set in a folder: with `Annotations/`, or with XML files beside the images; None if none is.

    Raises:
        DatasetError: a list of a split's images cannot be read.
    """
    inner = [path for path in folder.glob("VOC2*") if path.is_dir()]
    if len(inner) == 1:  # of the archive's VOCdevkit
        folder = inner[0]
    flat = _place(folder)
    if flat is not None and (lists := {split: folder / LISTS / f"{split}.txt" for split in LISTED}):
        listed = {split: _listed(path, flat[0][0].parent) for split, path in lists.items() if path.is_file()}
        if listed:
            return VocFolder(folder, {split: (files, flat[1]) for split, files in listed.items()}, anywhere)
    places = {split: _place(folder / split) for split in SPLITS}
    splits = {split: place for split, place in places.items() if place is not None}
    if not splits:  # Annotations/train beside images/train
        nested = {
            split: place
            for split in SPLITS
            for annotations in ANNOTATIONS
            for images in IMAGES
            if (place := _xml_files(folder / annotations / split, folder / images / split)) is not None
        }
        splits = nested or ({} if flat is None else {"train": flat})
    return VocFolder(folder, splits, anywhere) if splits else None


def _place(folder: Path) -> tuple[list[Path], Path] | None:
    """The XML files of a folder, in order, and the folder of their images."""
    for annotations in (*ANNOTATIONS, "."):
        for images in IMAGES:
            if (found := _xml_files(folder / annotations, folder / images)) is not None:
                return found
    return None


def _xml_files(annotations: Path, images: Path) -> tuple[list[Path], Path] | None:
    files = sorted(annotations.glob("*.xml"))
    return (files, images) if files and images.is_dir() and images_below(images) else None


def _listed(path: Path, annotations: Path) -> list[Path]:
    """The XML files of the images that a list names, one a line, first word."""
    try:
        lines = regular_file(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: the list of images cannot be read ({error}): write it anew.") from None
    return [annotations / f"{line.split()[0]}.xml" for line in lines if line.strip()]


def voc_source(voc: VocFolder) -> Source:
    """The data set's splits."""
    name = Path(os.path.abspath(voc.folder)).name
    splits = {split: partial(load_voc_split, voc, split, f"{name}/{split}") for split in voc.splits}
    return Source(str(voc.folder), splits)


def load_voc_split(voc: VocFolder, split: str, name: str) -> DetectionDataset:
    """Reads and checks one split; categories and images are numbered from 1, in order of their names.

    Raises:
        DatasetError: a file is missing, elsewhere, or cannot be read; or as `load_coco_split`.
    """
    files, image_folder = voc.splits[split]
    source = f"{voc.folder}, split {split}"
    check_image_files([str(path) for path in files], voc.roots, source, what="annotation files")
    images = _images_of(files, image_folder, voc, source)
    category_ids = {class_name: number for number, class_name in enumerate(voc.class_names, 1)}
    coco: dict = {"images": [], "annotations": []}
    coco["categories"] = [{"id": number, "name": class_name} for class_name, number in category_ids.items()]
    for image_id, (path, image) in enumerate(zip(files, images, strict=True), 1):
        described = voc.read[path]
        size = described.size or upright_size(image)
        width, height = size or SIZE_OF_BROKEN
        entry = {"id": image_id, "file_name": relative(image, voc.folder), "width": width, "height": height}
        coco["images"].append(entry)
        for thing in described.objects if size else ():
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[thing.name],
                    "bbox": thing.box,
                    "area": abs(thing.box[2] * thing.box[3]),
                    "iscrowd": int(thing.difficult),
                }
            )
    return load_converted(coco, voc.folder, name, source, voc.roots)


def _images_of(files: Iterable[Path], folder: Path, voc: VocFolder, source: str) -> list[Path]:
    """The image of each XML file: of its name, or else of the `filename` in it.

    Raises:
        DatasetError: images are missing or elsewhere.
    """
    there = images_below(folder)
    by_stem: dict[str, Path] = {}
    by_name: dict[str, Path] = {}
    for path in there:
        by_stem.setdefault(path.stem, path)
        by_name.setdefault(path.name, path)
    images = []
    for file in files:
        name = os.path.basename(voc.read[file].file_name.replace("\\", "/"))
        images.append(by_stem.get(file.stem) or by_name.get(name) or folder / (name or f"{file.stem}.jpg"))
    check_image_files([str(image) for image in images], voc.roots, source)
    return images


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, which may define entities that grow without end, in whatever encoding."""

    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which Pascal VOC has not")


def read_voc(path: Path) -> VocImage:
    """What an XML file of Pascal VOC says of its image.

    Raises:
        DatasetError: it is no such file, or lacks what a box needs; the message names file, object and field.
    """
    try:
        with regular_file(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DatasetError(f"{path}: larger than {MOST_BYTES // 10**6} MB: not read.")
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_WithoutDoctype()))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: of encodings
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: cannot be read as XML ({one_line(error)}): write it anew.") from None
    if root.tag != "annotation":
        raise DatasetError(f"{path}: its root is <{one_line(root.tag, 40)}>, not the <annotation> of Pascal VOC.")
    sides = [_number(root, f"size/{side}", path) for side in ("width", "height")]
    size = None if None in sides or min(sides) < 1 else (int(sides[0]), int(sides[1]))
    objects = [_object(element, f"{path}, object {index}") for index, element in enumerate(root.iter("object"), 1)]
    return VocImage(_text(root, "filename") or "", size, objects)


def _object(element: ElementTree.Element, place: str) -> VocObject:
    name = _text(element, "name")
    if not name:
        raise DatasetError(f"{place}: has no <name>: write its class there.")
    corners = [_number(element, f"bndbox/{corner}", place) for corner in ("xmin", "ymin", "xmax", "ymax")]
    if None in corners:
        raise DatasetError(f"{place} ({quoted(name)}): <bndbox> lacks a corner: it has xmin, ymin, xmax and ymax.")
    left, top = max(corners[0] - 1, 0), max(corners[1] - 1, 0)
    return VocObject(
        name, [left, top, corners[2] - left, corners[3] - top], bool(_number(element, "difficult", place))
    )


def _text(element: ElementTree.Element, path: str) -> str | None:
    text = element.findtext(path)
    return None if text is None else text.strip()


def _number(element: ElementTree.Element, path: str, place: object) -> float | None:
    text = _text(element, path)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DatasetError(f"{place}: <{path}> is {quoted(text)}: it must be a finite number.")
    return number
