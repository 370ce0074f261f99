"""One small data set, `coco_files.coco()`, written in each of the formats that are read."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.data.coco_files import coco, write_split

SIDES = 40, 30
NAMES = {5: "aeroplane", 90: "tooth brush"}
# by file name: class name and box xywh in pixels
SCENES: dict[str, list[tuple[str, list[float]]]] = {
    image["file_name"]: [
        (NAMES[each["category_id"]], each["bbox"]) for each in coco()["annotations"] if each["image_id"] == image["id"]
    ]
    for image in coco()["images"]
}
# what training sees of them: boxes xyxy in pixels and labels of each image
EXPECTED = [
    ([[0.5, 0, 40, 30]], [0]),
    ([[1, 2, 11, 22], [20, 10, 25, 15]], [1, 0]),
]


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIDES, "grey").save(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_coco(folder: Path) -> None:
    for split in ("train", "val"):
        write_split(folder, coco(), split)


def write_roboflow(folder: Path) -> None:
    """With its parent class, which would be class 0."""
    parent = {"id": 0, "name": "things", "supercategory": "none"}
    categories = [parent, *({**each, "supercategory": "things"} for each in coco()["categories"])]
    for split in ("train", "valid", "test"):
        write_text(folder / split / "_annotations.coco.json", json.dumps(coco(categories=categories)))
        for name in SCENES:
            write_image(folder / split / name)


def write_cvat(folder: Path) -> None:
    for split in ("train", "validation"):
        write_text(folder / "annotations" / f"instances_{split}.json", json.dumps(coco()))
        for name in SCENES:
            write_image(folder / "images" / split / name)


def write_metadata(folder: Path, key: str = "category", lists: bool = True) -> None:
    """As `datasets` takes it: an image folder, nothing said of sizes and ids; categories by name."""
    for split in ("train", "validation"):
        rows = []
        for name, things in SCENES.items():
            write_image(folder / split / name)
            objects: object = {"bbox": [box for _, box in things], key: [thing for thing, _ in things]}
            if not lists:
                objects = [{"bbox": box, key: thing} for thing, box in things]
            rows.append(json.dumps({"file_name": name, "objects": objects}))
        write_text(folder / split / "metadata.jsonl", "\n".join(rows))


def write_metadata_records(folder: Path) -> None:
    write_metadata(folder, "categories", lists=False)


def write_csv(folder: Path) -> None:
    """`objects` as JSON text, which is all that a table of texts can hold."""
    for split in ("train", "test"):
        rows = ["file_name,objects"]
        for name, things in SCENES.items():
            write_image(folder / split / name)
            objects = json.dumps({"bbox": [box for _, box in things], "label": [thing for thing, _ in things]})
            doubled = objects.replace('"', '""')
            rows.append(f'{name},"{doubled}"')
        write_text(folder / split / "metadata.csv", "\n".join(rows))


def yolo_lines(things: list[tuple[str, list[float]]]) -> str:
    """Classes by their place among `aeroplane` and `tooth brush`, boxes as centre and size."""
    lines = []
    for name, (x, y, width, height) in things:
        numbers = (x + width / 2) / 40, (y + height / 2) / 30, width / 40, height / 30
        lines.append(" ".join(map(str, [list(NAMES.values()).index(name), *numbers])))
    return "\n".join(lines)


def polygon_lines(things: list[tuple[str, list[float]]]) -> str:
    """The same boxes as diamonds that touch their sides."""
    lines = []
    for name, (x, y, w, h) in things:
        points = (x + w / 2, y), (x + w, y + h / 3), (x + w / 4, y + h), (x, y + h / 2)
        numbers = [number for px, py in points for number in (px / 40, py / 30)]
        lines.append(" ".join(map(str, [list(NAMES.values()).index(name), *numbers])))
    return "\n".join(lines)


def write_yolo(folder: Path) -> None:
    """As Ultralytics has it: images/train beside labels/train; the names as a mapping, the path from elsewhere."""
    write_text(
        folder / "data.yaml",
        "path: ../datasets/teeth\ntrain: images/train\nval: images/val\nnames:\n  0: aeroplane\n  1: tooth brush\n",
    )
    for split in ("train", "val"):
        for name, things in SCENES.items():
            write_image(folder / "images" / split / name)
            write_text(folder / "labels" / split / f"{Path(name).stem}.txt", yolo_lines(things))


def write_yolo_of_roboflow(folder: Path) -> None:
    """train/images beside train/labels, paths from a folder that is not there, polygons."""
    write_text(
        folder / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
        "names: ['aeroplane', 'tooth brush']\n\nroboflow:\n  workspace: teeth\n  version: 1\n",
    )
    for split in ("train", "valid", "test"):
        for name, things in SCENES.items():
            write_image(folder / split / "images" / name)
            write_text(folder / split / "labels" / f"{Path(name).stem}.txt", polygon_lines(things))


def write_yolo_without_yaml(folder: Path) -> None:
    write_text(folder / "classes.txt", "aeroplane\ntooth brush\n")
    for split in ("train", "val"):
        for name, things in SCENES.items():
            write_image(folder / "images" / split / name)
            write_text(folder / "images" / split / f"{Path(name).stem}.txt", yolo_lines(things))


def write_yolo_lists(folder: Path) -> None:
    """Text files that list the images of a split, of one folder."""
    write_text(folder / "data.yaml", "train: train.txt\nval: val.txt\nnames: [aeroplane, tooth brush]\n")
    for split in ("train", "val"):
        write_text(folder / f"{split}.txt", "".join(f"./images/{name}\n" for name in SCENES))
    for name, things in SCENES.items():
        write_image(folder / "images" / name)
        write_text(folder / "labels" / f"{Path(name).stem}.txt", yolo_lines(things))


def voc_xml(name: str, things: list[tuple[str, list[float]]], difficult: int = 0) -> str:
    """Corners are the first and the last pixel, from 1."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    for field, value in zip(("width", "height", "depth"), (*SIDES, 3), strict=True):
        ElementTree.SubElement(size, field).text = str(value)
    for thing, (x, y, width, height) in things:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = thing
        ElementTree.SubElement(element, "difficult").text = str(difficult)
        box = ElementTree.SubElement(element, "bndbox")
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        for corner, number in corners.items():
            ElementTree.SubElement(box, corner).text = str(number)
    return ElementTree.tostring(root, encoding="unicode")


def write_voc(folder: Path) -> None:
    """As in the archive: lists of the images of each split."""
    for name, things in SCENES.items():
        write_image(folder / "JPEGImages" / name)
        write_text(folder / "Annotations" / f"{Path(name).stem}.xml", voc_xml(name, things))
    for split in ("train", "val", "trainval"):
        write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{Path(name).stem}\n" for name in SCENES))


def write_voc_beside(folder: Path) -> None:
    """As Roboflow has it: XML files beside the images of each split."""
    for split in ("train", "valid"):
        for name, things in SCENES.items():
            write_image(folder / split / name)
            write_text(folder / split / f"{Path(name).stem}.xml", voc_xml(name, things))


WRITERS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("write_"): function
    for name, function in list(globals().items())
    if name.startswith("write_") and name not in ("write_image", "write_text", "write_split")
}
