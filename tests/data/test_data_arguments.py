from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import ConditionalDetrImageProcessorPil, HfArgumentParser, RTDetrImageProcessorPil

from d3etr_hf.data.collate import DetectionCollator
from d3etr_hf.data.data_arguments import (
    DataArguments,
    build_augmentation,
    build_fixed_size_augmentation,
    load_splits,
    with_side_divisor,
)
from d3etr_hf.data.transforms import CropSizes
from d3etr_hf.errors import DatasetError
from tests.data.coco_files import coco, write_split
from tests.data.test_hub_datasets import ROWS, write_parquet


def folder_of_two_splits(folder: Path, val: dict | None = None) -> Path:
    write_split(folder, coco(), "train")
    write_split(folder, coco() if val is None else val, "val")
    return folder


def test_every_argument_is_explained_and_can_be_given() -> None:
    """Guards `--help` and the command line."""
    assert all(field.metadata.get("help") for field in fields(DataArguments))
    words = "--data_folder a --augmentation multiscale --augmentation_short_sides 480 512 --max_val_images 5".split()
    (arguments,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(words)
    assert arguments == DataArguments(
        data_folder="a", augmentation="multiscale", augmentation_short_sides=[480, 512], max_val_images=5
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_folder": "a", "dataset_name": "b"}, "give one of"),
        ({"train_annotations": "a", "train_images": "b"}, "give all of"),
        ({"short_side": 15, "long_side": 20}, "short_side is 15: it must be at least 16"),
        ({"short_side": 800, "long_side": 799}, "long_side is 799: it must be at least short_side, which is 800"),
        ({"long_side": 800}, "give both short_side and long_side"),
        ({"image_size": 15}, "image_size is 15: it must be at least 16"),
        ({"image_size": 64, "short_side": 64, "long_side": 64}, "give image_size, or short_side and long_side"),
        ({"augmentation": "papre"}, "augmentation is 'papre': choose none, flip, multiscale, paper or strong"),
        ({"augmentation": "flip", "augmentation_short_sides": [480]}, "has no effect with augmentation 'flip'"),
        ({"augmentation_short_sides": []}, "give at least one"),
        ({"augmentation_short_sides": [15, 480]}, "each at least 16"),
        ({"augmentation_short_sides": [480, 1334], "short_side": 800, "long_side": 1333}, "which is 1333 pixels"),
        ({"max_train_images": 0}, "max_train_images is 0: it must be at least 1"),
        ({"max_val_images": -1}, "max_val_images is -1"),
        ({"dataset_workers": 0}, "dataset_workers is 0"),
    ],
)
def test_values_out_of_range_are_refused(given: dict, message: str) -> None:
    """Guards against a run that starts with nonsense, or ignores an option."""
    with pytest.raises(ValueError, match=message):
        DataArguments(**given)


def test_augmentations_and_their_scale() -> None:
    """Guards DETR's sizes at 800, and their proportion on small images."""
    assert build_augmentation(DataArguments(augmentation="none"), 800, 1333) is None
    flip = build_augmentation(DataArguments(augmentation="flip"), 800, 1333)
    assert (list(flip.short_sides), flip.long_side, flip.crop) == ([800], 1333, None)
    multiscale = build_augmentation(DataArguments(augmentation="multiscale"), 800, 1333)
    assert list(multiscale.short_sides) == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert multiscale.crop is None
    paper = build_augmentation(DataArguments(augmentation="paper"), 800, 1333)
    assert (list(paper.short_sides), paper.crop) == (list(multiscale.short_sides), CropSizes())
    small = build_augmentation(DataArguments(augmentation="paper"), 96, 160)
    assert list(small.short_sides) == [58, 61, 65, 69, 73, 77, 81, 84, 88, 92, 96]
    assert small.crop == CropSizes((48, 60, 72), 46, 72)
    own = build_augmentation(DataArguments(augmentation="paper", augmentation_short_sides=[100, 200]), 800, 1333)
    assert own.short_sides == [100, 200]


def test_augmentations_of_squares_and_their_scale() -> None:
    """Guards RT-DETR's sizes at 640, their proportion and their multiple on small images, and the way out without."""

    def sides(image_size: int, augmentation: str = "paper", divisor: int = 1, **options) -> list[int]:
        made = build_fixed_size_augmentation(
            DataArguments(augmentation=augmentation, **options), image_size, image_size, divisor
        )
        assert made.short_sides is None and (made.crop == CropSizes()) == (augmentation == "paper")
        assert all(height == width for height, width in made.batch_sizes)
        return [width for _, width in made.batch_sizes]

    assert build_fixed_size_augmentation(DataArguments(augmentation="none"), 640, 640) is None
    assert sides(640, "flip") == sides(625, "flip") == []
    for augmentation in ("multiscale", "paper"):
        assert sides(640, augmentation) == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
        assert sides(560, augmentation, augmentation_short_sides=[504, 560]) == [504, 560]
    assert set(sides(320)) == {256, 288, 320, 352, 384}
    assert set(sides(32)) == {32}
    assert sides(560) == []  # no multiple of 32, so the paper's keeps to it
    # of a model that splits an image into windows: as the authors of LW-DETR, and squares too small for that
    assert sorted(set(sides(640, divisor=64))) == [512, 576, 640, 704, 768]
    assert set(sides(64, divisor=64)) == {64} and sides(672, divisor=64) == [] == sides(560, divisor=56)
    assert sides(640, divisor=64, augmentation_short_sides=[480]) == [480]
    with pytest.raises(DatasetError, match="in multiples of 64, and images of 672×672 pixels are none"):
        sides(672, "multiscale", 64)
    with pytest.raises(DatasetError, match="560×560 pixels are none: give augmentation_short_sides, or choose flip"):
        sides(560, "multiscale")


def test_side_divisor_is_that_of_all_who_see_the_images(tmp_path: Path) -> None:
    arguments = DataArguments(data_folder=str(folder_of_two_splits(tmp_path / "teeth")), image_size=960)

    def drawn(teacher, *divisors) -> list[tuple[int, int]]:
        train, _ = load_splits(arguments, RTDetrImageProcessorPil(), teacher)
        changed = with_side_divisor(train, arguments, *divisors)
        assert changed.transform.image_processor is train.transform.image_processor
        assert changed.transform.teacher_processor is train.transform.teacher_processor
        return sorted(set(changed.transform.augmentation.batch_sizes))

    by_64 = [(side, side) for side in range(704, 1217, 64)]
    assert drawn(None, 64) == drawn(None, 64, 1) == by_64
    assert drawn(None, 64, 48) == drawn(RTDetrImageProcessorPil(), 64, 48) == [(768, 768), (960, 960), (1152, 1152)]
    # with pixels of its own the teacher's divisor is none of the student's business
    assert drawn(RTDetrImageProcessorPil(do_normalize=True), 64, 48) == by_64


def test_squares_are_squares_in_training_and_evaluation(tmp_path: Path) -> None:
    """Guards the size of images of 40×30 pixels, of whole batches, and what is saved with the model."""
    folder = str(folder_of_two_splits(tmp_path / "teeth"))
    processor = RTDetrImageProcessorPil()
    train, val = load_splits(DataArguments(data_folder=folder, image_size=96), processor)
    assert (processor.size.height, processor.size.width) == (96, 96)
    torch.manual_seed(0)
    batches = [DetectionCollator()([train[0], train[1]])["pixel_values"].shape for _ in range(20)]
    assert set(batches) == {(2, 3, side, side) for side in (64, 96, 128)}
    assert DetectionCollator()([val[0], val[1]])["pixel_values"].shape == (2, 3, 96, 96)
    assert load_splits(DataArguments(data_folder=folder), RTDetrImageProcessorPil())[1][0]["pixel_values"].shape == (
        3,
        640,
        640,
    )
    with pytest.raises(DatasetError, match="one fixed size, now 640×640 pixels: give image_size instead"):
        load_splits(DataArguments(data_folder=folder, short_side=96, long_side=96), RTDetrImageProcessorPil())
    with pytest.raises(DatasetError, match="image_size is 96, but .* give short_side and long_side instead"):
        load_splits(DataArguments(data_folder=folder, image_size=96), ConditionalDetrImageProcessorPil())
    nameless = ConditionalDetrImageProcessorPil(size={"shortest_edge": 96})
    with pytest.raises(DatasetError, match="size is {'shortest_edge': 96}: give short_side and long_side"):
        load_splits(DataArguments(data_folder=folder), nameless)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    """Guards against evaluation on flipped or cropped images, and training without augmentation."""
    arguments = DataArguments(data_folder=str(folder_of_two_splits(tmp_path / "teeth")), short_side=60, long_side=100)
    processor = ConditionalDetrImageProcessorPil()
    train, val = load_splits(arguments, processor)
    assert (train.name, val.name) == ("teeth/train", "teeth/val")
    assert (processor.size.shortest_edge, processor.size.longest_edge) == (60, 100)
    torch.manual_seed(0)
    train_sizes = {tuple(train[0]["pixel_values"].shape) for _ in range(10)}
    assert len(train_sizes) > 3
    assert min(min(size[1:]) for size in train_sizes) < 50
    assert {tuple(val[0]["pixel_values"].shape) for _ in range(10)} == {(3, 60, 80)}
    batch = DetectionCollator()([train[0], train[1], val[0]])
    assert batch["pixel_values"].shape[:2] == (3, 3)


def test_the_first_images_only(tmp_path: Path) -> None:
    """Guards trial runs: the images, and the ground truth they are judged by."""
    folder = str(folder_of_two_splits(tmp_path))
    arguments = DataArguments(data_folder=folder, max_train_images=1, max_val_images=1)
    train, val = load_splits(arguments, ConditionalDetrImageProcessorPil())
    assert train.rows["image_id"][:] == val.rows["image_id"][:] == [7]
    assert [image["id"] for image in val.ground_truth["images"]] == [7]
    arguments = DataArguments(data_folder=folder, max_train_images=99)
    assert list(map(len, load_splits(arguments, ConditionalDetrImageProcessorPil()))) == [2, 2]


def test_explicit_paths(tmp_path: Path) -> None:
    """Guards data that lie in another layout, and train taken for val."""
    train_annotations, train_images = write_split(tmp_path / "here", coco(), "some")
    val_annotations, val_images = write_split(tmp_path / "there", coco(images=coco()["images"][::-1]), "other")
    train, val = load_splits(
        DataArguments(
            train_annotations=str(train_annotations),
            train_images=str(train_images),
            val_annotations=str(val_annotations),
            val_images=str(val_images),
        ),
        ConditionalDetrImageProcessorPil(),
    )
    assert (train.rows["image_id"][:], val.rows["image_id"][:]) == ([7, 3], [3, 7])
    assert val.rows[0]["image_path"] == str(val_images / "3.png")


def test_hub_data(tmp_path: Path) -> None:
    """Guards the names of the Hub's splits."""
    write_parquet(tmp_path / "planes", ROWS[2:], "train")
    write_parquet(tmp_path / "planes", [{**ROWS[2], "image_id": 5}], "validation")
    write_parquet(tmp_path / "planes", [{**ROWS[2], "image_id": 6}], "test")
    arguments = DataArguments(dataset_name=str(tmp_path / "planes"))
    train, val = load_splits(arguments, ConditionalDetrImageProcessorPil())
    assert (train.rows[0]["image_id"], val.rows[0]["image_id"]) == (4, 5)
    assert val[0]["labels"]["class_labels"].tolist() == [2]
    arguments = DataArguments(dataset_name=str(tmp_path / "planes"), dataset_val_split="test")
    assert load_splits(arguments, ConditionalDetrImageProcessorPil())[1].rows[0]["image_id"] == 6


def test_no_data_named() -> None:
    """Guards the first message that a new user sees."""
    with pytest.raises(DatasetError, match="no data: give data_folder"):
        load_splits(DataArguments(), ConditionalDetrImageProcessorPil())


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (
            [{"id": 90, "name": "hair drier"}, {"id": 5, "name": "aeroplane"}],
            "category 90 is 'tooth brush' in teeth/train but 'hair drier' in teeth/val",
        ),
        (
            [*coco()["categories"], {"id": 6, "name": "bus"}],
            "category 6 is missing in teeth/train but 'bus' in teeth/val",
        ),
        (
            [{"id": 90, "name": "aeroplane"}, {"id": 5, "name": "tooth brush"}],
            "category 5 is 'aeroplane' in teeth/train",
        ),
    ],
)
def test_splits_of_different_categories_are_refused(tmp_path: Path, categories: list[dict], message: str) -> None:
    """Guards against evaluation under other class labels than those trained."""
    folder = folder_of_two_splits(tmp_path / "teeth", coco(categories=categories))
    with pytest.raises(DatasetError, match=message):
        load_splits(DataArguments(data_folder=str(folder)), ConditionalDetrImageProcessorPil())
