from io import BytesIO
from pathlib import Path

import datasets
import pytest
from PIL import ExifTags, Image

from d3etr_hf.data.hub_datasets import load_hub_split, name_of_folder
from d3etr_hf.errors import DatasetError

NAMES = ["aeroplane", "bicycle", "cat"]
CLASS = datasets.ClassLabel(names=NAMES)
INTEGER = datasets.Value("int64")
BOX = datasets.List(datasets.Value("float32"), length=4)


def png(colour: str = "grey", size: tuple[int, int] = (40, 30), orientation: int = 1) -> dict:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stream = BytesIO()
    Image.new("RGB", size, colour).save(stream, "png", exif=exif)
    return {"bytes": stream.getvalue(), "path": None}


def row(image_id: int, objects: list[dict], **changes: object) -> dict:
    return {"image": png(), "image_id": image_id, "width": 40, "height": 30, "objects": objects, **changes}


ROWS = [
    row(
        7,
        [
            {"id": 0, "bbox": [1.0, 2, 10, 20], "category": 2, "area": 150.5},
            {"id": 0, "bbox": [-4.0, 0, 8, 8], "category": 0, "area": None},
        ],
    ),
    row(3, []),
    row(4, [{"id": 0, "bbox": [0.0, 0, 5, 5], "category": 2, "area": 25.0}], image=png("red")),
]


def write_parquet(
    folder: Path,
    rows: list[dict],
    split: str = "train",
    category: object = CLASS,
    as_lists: bool = False,
    fields: tuple[str, ...] = ("id", "bbox", "category", "area"),
) -> Path:
    """Writes one Parquet file of a split; `as_lists` stores `objects` as a record of lists."""
    types = {"id": INTEGER, "bbox": BOX, "category": category, "area": datasets.Value("float32"), "iscrowd": INTEGER}
    types = {field: types[field] for field in fields}
    features = {"image": datasets.Image(), "image_id": INTEGER, "width": INTEGER, "height": INTEGER}
    if as_lists:
        features["objects"] = {field: datasets.List(types[field]) for field in fields}
        rows = [
            {**entry, "objects": {field: [thing.get(field) for thing in entry["objects"]] for field in fields}}
            for entry in rows
        ]
    else:
        features["objects"] = datasets.List(types)
        rows = [
            {**entry, "objects": [{field: thing.get(field) for field in fields} for thing in entry["objects"]]}
            for entry in rows
        ]
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("as_lists", [False, True])
def test_both_forms_of_objects(tmp_path: Path, as_lists: bool) -> None:
    """Guards images, boxes, labels and ground truth, whichever way round `objects` is stored."""
    folder = write_parquet(tmp_path / "planes", ROWS, as_lists=as_lists)
    with pytest.warns(UserWarning, match=r"planes/train: boxes partly outside their image clipped: 1 .*\[2\]"):
        dataset = load_hub_split(folder, "train")
    assert (len(dataset), dataset.class_names, dataset.category_ids) == (3, NAMES, [0, 1, 2])
    examples = [dataset[index] for index in range(3)]
    assert [example["target"]["image_id"] for example in examples] == [7, 3, 4]
    assert [example["target"]["boxes"].tolist() for example in examples] == [
        [[1, 2, 11, 22], [0, 0, 4, 8]],
        [],
        [[0, 0, 5, 5]],
    ]
    assert [example["target"]["class_labels"].tolist() for example in examples] == [[2, 0], [], [2]]
    assert examples[2]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert dataset.ground_truth == {
        "images": [{"id": image_id, "width": 40, "height": 30} for image_id in (7, 3, 4)],
        "annotations": [
            {"id": 1, "image_id": 7, "bbox": [1, 2, 10, 20], "category_id": 2, "area": 150.5},
            {"id": 2, "image_id": 7, "bbox": [-4, 0, 8, 8], "category_id": 0},
            {"id": 3, "image_id": 4, "bbox": [0, 0, 5, 5], "category_id": 2, "area": 25},
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(NAMES)],
    }
    assert [region["id"] for region in dataset.select([2]).ground_truth["annotations"]] == [3]


@pytest.mark.parametrize("given", ["{folder}", "{folder}/", "parts", "parts/", "./parts", ".", "parts/.."])
def test_a_folder_is_named_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Names are published; nobody need know where the folder lies."""
    folder = tmp_path / "somebody" / "parts"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder if given == "." else folder.parent)
    name = "somebody" if given.endswith("..") else "parts"
    assert name_of_folder(given.format(folder=folder)) == name
    assert name_of_folder("user/parts") == "user/parts"


def test_crowds_are_kept_in_the_ground_truth_only(tmp_path: Path) -> None:
    """Guards against training on crowds, and against counting detections in them as false."""
    things = [{"bbox": [0.0, 0, 5, 5], "category": 1, "iscrowd": crowd} for crowd in (0, 1)]
    folder = write_parquet(tmp_path / "a", [row(1, things)], fields=("bbox", "category", "iscrowd"))
    dataset = load_hub_split(folder, "train")
    assert len(dataset[0]["target"]["boxes"]) == 1
    assert [region["iscrowd"] for region in dataset.ground_truth["annotations"]] == [0, 1]


def test_plain_integer_categories_are_those_of_all_splits(tmp_path: Path) -> None:
    """Guards against labels that differ between splits because one split lacks a category."""
    folder = write_parquet(tmp_path / "a", ROWS[2:], category=INTEGER)
    other = row(1, [{"bbox": [0.0, 0, 5, 5], "category": 90}])
    write_parquet(folder, [other], split="validation", category=INTEGER)
    train, validation = (load_hub_split(folder, split) for split in ("train", "validation"))
    assert train.category_ids == validation.category_ids == [2, 90]
    assert train.class_names == validation.class_names == ["category 2", "category 90"]
    assert train[0]["target"]["class_labels"].tolist() == [0]
    assert validation[0]["target"]["class_labels"].tolist() == [1]


@pytest.mark.parametrize(("width", "height", "expected"), [(30, 40, (30, 40)), (40, 30, (40, 30))])
def test_the_annotated_size_decides_on_exif(
    tmp_path: Path, width: int, height: int, expected: tuple[int, int]
) -> None:
    """Guards against the decoder of `datasets`, which always turns the image."""
    things = [{"bbox": [0.0, 0, 5, 5], "category": 1}]
    entry = row(1, things, image=png(orientation=6), width=width, height=height)
    dataset = load_hub_split(write_parquet(tmp_path / "a", [entry]), "train")
    assert dataset.read_image(0).size == expected


def test_a_broken_image_is_named_by_its_id(tmp_path: Path) -> None:
    """Guards the message where there is no file name."""
    things = [{"bbox": [0.0, 0, 5, 5], "category": 1}]
    entry = row(17, things, image={"bytes": png()["bytes"][:50], "path": None})
    dataset = load_hub_split(write_parquet(tmp_path / "a", [entry]), "train", name="planes")
    with pytest.raises(DatasetError, match="planes, image 17: the image cannot be read"):
        dataset[0]


def test_changed_parquet_is_read_anew(tmp_path: Path) -> None:
    """Guards against the cache of `datasets` handing out the old file's rows."""
    folder = write_parquet(tmp_path / "a", ROWS[2:])
    assert load_hub_split(folder, "train").rows[0]["image_id"] == 4
    write_parquet(folder, [{**ROWS[2], "image_id": 5}])
    assert load_hub_split(folder, "train").rows[0]["image_id"] == 5


def test_null_objects_mean_no_objects(tmp_path: Path) -> None:
    """Guards against a TypeError for background images."""
    folder = write_parquet(tmp_path / "a", [{**ROWS[2]}])
    rows = datasets.Dataset.from_parquet(str(folder / "train-00000-of-00001.parquet"))
    empty = datasets.Dataset.from_list([{**ROWS[1], "objects": None}], features=rows.features)
    datasets.concatenate_datasets([rows, empty]).to_parquet(folder / "train-00000-of-00001.parquet")
    dataset = load_hub_split(folder, "train")
    assert [len(dataset[index]["target"]["boxes"]) for index in range(2)] == [1, 0]


def rewritten(folder: Path, change: object) -> Path:
    path = folder / "train-00000-of-00001.parquet"
    changed = change(datasets.Dataset.from_parquet(str(path)))
    path.unlink()
    changed.to_parquet(path)
    return folder


def with_null_image(rows: datasets.Dataset) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**ROWS[2], "image": None}], features=rows.features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("width"), r"a/train: the columns \['width'\] are missing"),
        (lambda rows: rows.remove_columns("image"), r"a/train: the columns \['image'\] are missing"),
        (
            lambda rows: rows.remove_columns("objects").add_column("objects", [3]),
            r"\['bbox', 'category'\] of `objects`",
        ),
        (with_null_image, "a/train: 1 rows have no image"),
        (lambda rows: datasets.concatenate_datasets([rows, rows]), "a/train: image id 4 appears more than once"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, change: object, message: str) -> None:
    """Guards against a KeyError deep in the reading of another schema."""
    folder = rewritten(write_parquet(tmp_path / "a", ROWS[2:]), change)
    with pytest.raises(DatasetError, match=message):
        load_hub_split(folder, "train")


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ({"bbox": [0.0, 0, 5, 5], "category": None}, r"annotations\[0\] .*`category_id` None"),
        ({"bbox": [0.0, 0, 5, 5], "category": -1}, "annotation 1 of image 9 has category -1"),
        ({"bbox": None, "category": 1}, r"annotations\[0\] \(id 1, image_id 9\) has `bbox` None"),
        ({"bbox": [0.0, 0, 0, 5], "category": 1}, "no usable box is left of 1 annotations"),
    ],
)
@pytest.mark.parametrize("as_lists", [False, True])
def test_objects_that_do_not_fit(tmp_path: Path, thing: dict, message: str, as_lists: bool) -> None:
    """Guards against unlabelled or boxless objects that reach training."""
    folder = write_parquet(tmp_path / "a", [row(9, [thing])], as_lists=as_lists)
    with pytest.raises(DatasetError, match=message):
        load_hub_split(folder, "train")


def test_fields_of_different_length_are_refused(tmp_path: Path) -> None:
    """Guards against boxes paired with the wrong labels."""
    folder = write_parquet(tmp_path / "a", ROWS[2:], as_lists=True, fields=("bbox", "category"))

    def shortened(rows: datasets.Dataset) -> datasets.Dataset:
        objects = {"bbox": [[0.0, 0, 5, 5]], "category": [1, 2]}
        return datasets.Dataset.from_list([{**ROWS[2], "objects": objects}], features=rows.features)

    with pytest.raises(DatasetError, match=r"`objects` of image 4 differ in length: .*'bbox': 1, 'category': 2"):
        load_hub_split(rewritten(folder, shortened), "train")


def test_a_data_set_or_split_that_is_not_there(tmp_path: Path) -> None:
    """Guards the messages for a typing mistake."""
    with pytest.raises(DatasetError, match="nowhere: the data set cannot be loaded"):
        load_hub_split(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: the data set cannot be loaded"):
        load_hub_split(tmp_path / "empty", "train")
    folder = write_parquet(tmp_path / "a", ROWS[2:])
    with pytest.raises(DatasetError, match="no split `val`: choose one of train"):
        load_hub_split(folder, "val")


@pytest.mark.parametrize("kept_share", [0, 0.3, 0.9])
def test_a_damaged_cached_copy_is_made_anew(tmp_path: Path, kept_share: float) -> None:
    """Guards against a disk that was full once: the Parquet files are whole."""
    folder = write_parquet(tmp_path / "a", ROWS[2:])
    first = load_hub_split(folder, "train", cache_dir=tmp_path / "cache").rows.to_list()
    (kept,) = (tmp_path / "cache").rglob("*.arrow")
    kept.write_bytes(kept.read_bytes()[: int(kept.stat().st_size * kept_share)])
    for _ in range(2):
        assert load_hub_split(folder, "train", cache_dir=tmp_path / "cache").rows.to_list() == first
