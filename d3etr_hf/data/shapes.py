"""A small synthetic detection data set in COCO format: circles, rectangles and triangles.

It is made in seconds, without a network, and is hard enough to tell a trained detector from an untrained one and a
large detector from a small one: shapes vary in size, place, tint and texture, overlap a little, and lie on an uneven
background.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from d3etr_hf.errors import ShapesError

# Raise this whenever the same arguments would give other images or annotations than before.
FORMAT_VERSION = 1

CATEGORIES = {1: "circle", 2: "rectangle", 3: "triangle"}
COLOURS = {1: (196, 72, 64), 2: (72, 164, 84), 3: (72, 100, 200)}
SPLITS = ("train", "val")

MOST_SHAPES = 4
SMALLEST_SIDE, LARGEST_SIDE = 16, 44
LARGEST_OVERLAP = 0.1
PLACING_ATTEMPTS = 50


@dataclass
class Shape:
    """One visible shape: `box` is (left, top, width, height) in whole pixels, `area` its number of visible pixels."""

    category_id: int
    box: tuple[int, int, int, int]
    area: int


def make_shapes(
    folder: str | Path,
    train_images: int = 4000,
    val_images: int = 200,
    image_size: int = 96,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Makes the data set in `folder` and returns the folder.

    The folder gets `annotations/{train,val}.json` (COCO detection JSON: boxes x, y, width, height in pixels, tight
    around the visible pixels; category ids 1 circle, 2 rectangle, 3 triangle; no crowds), `{train,val}/000001.png`
    and so on (RGB, `image_size` × `image_size`), and `shapes.json`, which records the arguments. Image i of a split
    depends on `seed`, `image_size` and i alone, so a smaller data set is a prefix of a larger one.

    If the folder already holds exactly this data set nothing is done; an interrupted run is completed.

    Raises:
        ShapesError: an argument is out of range, or the folder holds another data set or other files.
    """
    for name, value, smallest in (
        ("train_images", train_images, 1),
        ("val_images", val_images, 1),
        ("image_size", image_size, LARGEST_SIDE),
        ("seed", seed, 0),
    ):
        if value < smallest:
            raise ShapesError(f"{name} must be at least {smallest}, got {value}")

    folder = Path(folder)
    counts = {"train": train_images, "val": val_images}
    record = {"format_version": FORMAT_VERSION, "image_size": image_size, "seed": seed, "images": counts}
    _claim_folder(folder, record)
    for split in SPLITS:
        _make_split(folder, split, counts[split], image_size, seed, progress)
    return folder


def draw_scene(
    generator: np.random.Generator, image_size: int = 96, noise: bool = True
) -> tuple[Image.Image, list[Shape]]:
    """Draws one scene of 1 to 4 shapes, each 16 to 44 pixels wide and high before a later one covers its edge.

    Without `noise` the background is plain grey and every shape has exactly its class's colour.

    Returns:
        The RGB image (`image_size` × `image_size`) and its shapes.
    """
    owner = np.full((image_size, image_size), -1)  # which shape each pixel shows; -1 is background
    category_ids: list[int] = []
    placed_boxes: list[tuple[int, int, int, int]] = []
    for _ in range(generator.integers(1, MOST_SHAPES + 1)):
        category_id = int(generator.integers(1, len(CATEGORIES) + 1))
        box = _place_box(generator, category_id, image_size, placed_boxes)
        if box is None:
            continue
        owner[_shape_mask(generator, category_id, box, image_size)] = len(category_ids)
        category_ids.append(category_id)
        placed_boxes.append(box)

    pixels = np.full((image_size, image_size, 3), 128.0)
    if noise:
        pixels += generator.uniform(-35, 35) + _smooth_field(generator, image_size, cells=5, amplitude=45)
    shapes = []
    for index, category_id in enumerate(category_ids):
        visible = owner == index
        surface = np.full_like(pixels, COLOURS[category_id])
        if noise:
            surface += generator.uniform(-28, 28, size=3) + _smooth_field(
                generator, image_size, cells=16, amplitude=25
            )
        pixels[visible] = surface[visible]
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        box = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
        shapes.append(Shape(category_id, box, int(visible.sum())))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), shapes


def _claim_folder(folder: Path, record: dict) -> None:
    """Writes `record` to the folder's shapes.json, or checks that it is what the folder already holds."""
    record_path = folder / "shapes.json"
    if record_path.exists():
        try:
            found = json.loads(record_path.read_text())
        except ValueError as error:
            raise ShapesError(f"{record_path}: not valid JSON ({error}); delete {folder} or name another") from None
        if found != record:
            raise ShapesError(
                f"{folder} holds another shapes data set ({found}) than the one asked for ({record}); "
                "name another folder or delete this one"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ShapesError(f"{folder} is not empty and is no shapes data set (no shapes.json); name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(record_path, record)


def _make_split(folder: Path, split: str, count: int, image_size: int, seed: int, progress: bool) -> None:
    annotations_path = folder / "annotations" / f"{split}.json"
    image_paths = {index: folder / split / f"{index:06d}.png" for index in range(1, count + 1)}
    # The annotations are written last: if they are there, only images deleted since can be missing.
    if annotations_path.exists() and all(path.exists() for path in image_paths.values()):
        return
    annotations_path.parent.mkdir(exist_ok=True)
    (folder / split).mkdir(exist_ok=True)

    images, annotations = [], []
    for index, path in tqdm(image_paths.items(), desc=f"shapes, {split}", unit="image", disable=not progress):
        image, shapes = draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]), image_size)
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            image.save(unfinished, format="PNG", compress_level=1)
            unfinished.replace(path)
        images.append({"id": index, "file_name": path.name, "width": image_size, "height": image_size})
        for shape in shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": shape.category_id,
                    "bbox": list(shape.box),
                    "area": shape.area,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()]
    _write_json(annotations_path, {"images": images, "annotations": annotations, "categories": categories})


def _place_box(
    generator: np.random.Generator, category_id: int, image_size: int, others: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A random (left, top, width, height) in pixels that hardly overlaps `others`, or None where none was found."""
    for _ in range(PLACING_ATTEMPTS):
        width, height = (int(side) for side in generator.integers(SMALLEST_SIDE, LARGEST_SIDE + 1, size=2))
        if CATEGORIES[category_id] == "circle":
            height = width
        left = int(generator.integers(0, image_size - width + 1))
        top = int(generator.integers(0, image_size - height + 1))
        box = (left, top, width, height)
        if all(_overlap(box, other) < LARGEST_OVERLAP for other in others):
            return box
    return None


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """The share of the smaller (left, top, width, height) box that lies in the other; no less than their IoU."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0) / min(first[2] * first[3], second[2] * second[3])


def _shape_mask(
    generator: np.random.Generator, category_id: int, box: tuple[int, int, int, int], image_size: int
) -> np.ndarray:
    """The pixels (image_size, image_size; bool) of a shape that fills `box` (left, top, width, height)."""
    left, top, width, height = box
    right, bottom = left + width - 1, top + height - 1  # PIL's corners are inclusive
    mask = Image.new("1", (image_size, image_size))
    draw = ImageDraw.Draw(mask)
    match CATEGORIES[category_id]:
        case "circle":
            draw.ellipse((left, top, right, bottom), fill=1)
        case "rectangle":
            draw.rectangle((left, top, right, bottom), fill=1)
        case "triangle":
            apex_x, apex_y = int(generator.integers(left, right + 1)), int(generator.integers(top, bottom + 1))
            corners = (
                ((apex_x, top), (left, bottom), (right, bottom)),
                ((apex_x, bottom), (left, top), (right, top)),
                ((left, apex_y), (right, top), (right, bottom)),
                ((right, apex_y), (left, top), (left, bottom)),
            )
            draw.polygon(corners[generator.integers(4)], fill=1)
    return np.array(mask)


def _smooth_field(generator: np.random.Generator, image_size: int, cells: int, amplitude: float) -> np.ndarray:
    """Low-frequency noise (image_size, image_size, 3; float) of about ±`amplitude`, from a coarse grid."""
    coarse = generator.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8)
    fine = Image.fromarray(coarse).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return (np.asarray(fine) / 127.5 - 1) * amplitude


def _write_json(path: Path, content: dict) -> None:
    """Writes a JSON file that is either wholly there or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)
