"""Small data sets in COCO format, written by the tests that need them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def coco(**changes: Any) -> dict:
    """Two images of 40×30 pixels, three boxes of two categories; `changes` replace top-level parts."""
    content = {
        "images": [
            {"id": 7, "file_name": "7.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "3.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 11, "image_id": 3, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150.5, "iscrowd": 0},
            {"id": 12, "image_id": 7, "category_id": 5, "bbox": [0.5, 0, 39.5, 30], "area": 1185.0, "iscrowd": 0},
            {"id": 13, "image_id": 3, "category_id": 5, "bbox": [20, 10, 5, 5], "area": 25.0, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "tooth brush"}, {"id": 5, "name": "aeroplane"}],
    }
    return {**content, **changes}


def annotation(annotation_id: int, box: list[float], image_id: int = 3, **changes: Any) -> dict:
    """One annotation of category 5; box xywh in pixels."""
    return {"id": annotation_id, "image_id": image_id, "category_id": 5, "bbox": box, **changes}


def write_split(folder: Path, content: dict, split: str = "train") -> tuple[Path, Path]:
    """Writes the JSON and a grey image for every entry that is well formed; returns the JSON's path and the folder."""
    annotations, images = folder / "annotations" / f"{split}.json", folder / split
    annotations.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(content), encoding="utf-8")
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"]), "grey").save(images / image["file_name"])
    return annotations, images
