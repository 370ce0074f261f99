"""Detections are those that evaluation sees; where pictures take their images, classes and titles from."""

import copy
import json
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import ConvNextForImageClassification

from d3etr_hf.data import DataArguments, find_coco_split, load_coco_split
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.data.transforms import DetectionTransform
from d3etr_hf.errors import DatasetError, PictureError
from d3etr_hf.evaluation import predict_detections
from d3etr_hf.evaluation.image_detections import ImagesForModel
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.visualization import attention_picture, detection_grid, detections_on_images
from d3etr_hf.visualization.detections_on_images import (
    ChosenImages,
    ImageSource,
    choose_images,
    common_classes,
    detection_columns,
    draw_detection_pages,
    ground_truth_rows,
    images_of_files,
    model_titles,
)
from tests.tiny import tiny_config, tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]


def noise(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [noise(60, 40, 1), noise(30, 70, 2), noise(200, 150, 3)]


@pytest.fixture
def processor():
    return load_image_processor(None, 48, 80)


def save(model, processor, folder) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def chosen_of(images, ground_truth=None, class_names=()) -> ChosenImages:
    return ChosenImages([f"{index}.png" for index in range(len(images))], images, ground_truth, list(class_names))


def test_detections_are_those_that_evaluation_sees(tmp_path, processor):
    """Guards against another resize, padding or batch than the evaluation's, on images of a folder and of a split."""
    make_shapes(tmp_path / "shapes", 1, 3, progress=False)
    split = load_coco_split(*find_coco_split(tmp_path / "shapes", "val")).with_transform(DetectionTransform(processor))
    images = [split.read_image(index) for index in range(3)]
    model = tiny_model().train()  # dropout is off in the tiny configuration; the mode must change all the same
    columns, names = detection_columns(chosen_of(images), {"a": (model, processor)}, batch_size=2)
    assert names == model.class_names and not model.training and not columns["a"][0].requires_grad
    wanted = predict_detections(model, split, batch_size=2)
    assert torch.equal(torch.stack(columns["a"]), wanted[:, :21])  # 7 queries x 3 classes


def test_diverged_and_unresizable(processor):
    model = tiny_model()
    model.class_labels_classifier.bias.data[1] = float("nan")
    with pytest.raises(PictureError, match="b: the outputs are not finite"):
        detection_columns(chosen_of(IMAGES), {"a": (tiny_model(), processor), "b": (model, processor)})
    with pytest.raises(DatasetError, match="narrow.png: image 1 of 4000×1 pixels cannot be resized"):
        ImagesForModel([IMAGES[0], noise(4000, 1)], ["good.png", "narrow.png"], processor)[1]


def test_classes_are_joined_by_name():
    """Data first, then what only models have; case and surrounding space aside."""
    names, indices = common_classes(["cat", "dog"], ["Dog ", "bird", "cat"], ["zebra", "BIRD"])
    assert names == ["cat", "dog", "bird", "zebra"]
    assert [index.tolist() for index in indices] == [[0, 1], [1, 2, 0], [3, 2]]


def test_models_with_permuted_classes_share_names_and_colours(processor):
    """Guards against labels taken for classes: a teacher's label 0 need not be the data set's."""
    model, other = tiny_model(), copy.deepcopy(tiny_model())
    order = torch.tensor([2, 0, 1])
    head = other.class_labels_classifier
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    other.config.id2label = {0: "Triangle", 1: "circle", 2: "rectangle"}
    truth = [torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0, 1.0]])]
    chosen = chosen_of(IMAGES[:1], truth, ["square", "rectangle"])
    models = {"teacher": (other, processor), "student": (model, processor)}
    columns, names = detection_columns(chosen, models)
    assert names == ["square", "rectangle", "Triangle", "circle"]
    assert list(columns) == ["ground truth", "teacher", "student"]
    assert columns["ground truth"][0].tolist() == truth[0].tolist()
    torch.testing.assert_close(columns["teacher"][0], columns["student"][0])
    own = predict_detections(model, ImagesForModel(IMAGES[:1], ["a"], processor))[0][:21, 5]
    assert columns["student"][0][:, 5].tolist() == [[3, 1, 2][int(label)] for label in own]


def test_folder_in_order_upright_and_of_any_kind(tmp_path, caplog):
    noise(20, 10).save(tmp_path / "b.png")
    Image.fromarray(np.full((6, 8), 65535, dtype=np.uint16)).save(tmp_path / "c.tiff")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(20, 10).save(tmp_path / "a.jpg", exif=exif)
    Image.new("P", (5, 5)).save(tmp_path / "d.gif")
    (tmp_path / "aa.txt").write_text("no image")
    (tmp_path / "ab.jpg").write_text("no image either")
    with caplog.at_level(logging.WARNING):
        source = images_of_files([str(tmp_path)])
    (page,) = source.pages(9)
    assert page.names == source.names == ["a.jpg", "b.png", "d.gif"]
    assert [image.size for image in page.images] == [(10, 20), (20, 10), (5, 5)]
    assert all(image.mode == "RGB" for image in page.images)
    assert page.ground_truth is None and page.class_names == []
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (  # c.tiff has 16 bits, which the detector's own pipeline would read as white
        f"left out 2 files that are no readable images: {tmp_path / 'ab.jpg'}, {tmp_path / 'c.tiff'}"
    )
    assert [page.names for page in source.pages(2)] == [["a.jpg", "b.png"]]
    assert [source.place_of(number) for number in (None, 1, 3)] == [0, 0, 2]
    with pytest.raises(PictureError, match=r"image is 0: there are 3 images, counted from 1 .* lie in 1..3"):
        source.place_of(0)


def test_images_and_ground_truth_of_either_split(tmp_path):
    make_shapes(tmp_path / "shapes", 4, 3, progress=False)
    data = DataArguments(data_folder=str(tmp_path / "shapes"))
    source = choose_images(None, data, "val")
    (page,) = source.pages(2)
    assert len(page.images) == len(page.ground_truth) == 2
    assert page.class_names == ["circle", "rectangle", "triangle"]
    assert page.names[0] == f"shapes/val, image {source.numbers[0]}"
    assert [len(page.images) for page in source.pages(9)] == [3]
    assert [len(page.images) for page in choose_images(None, data, "train").pages(9)] == [4]
    target = {"boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]]), "class_labels": torch.tensor([2])}
    assert ground_truth_rows(target).tolist() == [[1, 2, 3, 6, 1, 2]]
    with pytest.raises(PictureError, match="'images' or a data set .*: not both"):
        choose_images([str(tmp_path)], data)
    with pytest.raises(PictureError, match="'images' or a data set .*: neither is there"):
        choose_images(None, DataArguments())


def test_an_image_is_named_by_its_id(tmp_path):
    """Guards places taken for image ids, which start at 1 in most data sets."""
    make_shapes(tmp_path / "shapes", 1, 3, progress=False)
    file = tmp_path / "shapes" / "annotations" / "val.json"
    content = json.loads(file.read_text())
    wanted = content["images"][2]["file_name"]
    new = dict(zip([image["id"] for image in content["images"]], (7, 3, 1), strict=True))
    for entry in content["images"]:
        entry["id"] = new[entry["id"]]
    for entry in content["annotations"]:
        entry["image_id"] = new[entry["image_id"]]
    file.write_text(json.dumps(content))
    source = choose_images(None, DataArguments(data_folder=str(tmp_path / "shapes")))
    image, _ = source.read(source.place_of(1))
    expected = next((tmp_path / "shapes").rglob(Path(wanted).name))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(expected).convert("RGB")))
    with pytest.raises(PictureError, match="image is 2: shapes/val has 3 images, whose ids lie in 1..7, the first of"):
        source.place_of(2)


def test_titles_tell_models_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/a/teacher/checkpoint-20").mkdir(parents=True)
    assert model_titles("runs/a/teacher", "microsoft/conditional-detr") == ["teacher", "conditional-detr"]
    assert model_titles("runs/a/teacher", "runs/b/teacher") == ["a/teacher", "b/teacher"]
    assert model_titles("runs/a/teacher/checkpoint-20") == ["teacher/checkpoint-20"]
    assert model_titles("runs/a/teacher/") == ["teacher"]
    (long,) = model_titles("me/" + "x" * 20 + "y" * 20)
    assert long == "x" * 12 + "…" + "y" * 17
    monkeypatch.chdir("runs/a/teacher")
    assert model_titles(".") == ["teacher"]
    with pytest.raises(PictureError, match="two different ones"):
        model_titles(".", "../teacher")


@pytest.mark.parametrize(
    ("images", "pages"),
    [(8, {"detections.png": 8}), (17, {"detections_1.png": 8, "detections_2.png": 8, "detections_3.png": 1})],
)
def test_eight_images_a_page(tmp_path, monkeypatch, processor, images, pages):
    """Every image is drawn, and only those of one page are in memory."""
    drawn = {}

    def draw(images, columns, class_names, path, score_threshold):
        assert len(columns["a"]) == len(images) and score_threshold == 0.3
        drawn[path.name] = [image.width for image in images]

    monkeypatch.setattr(detections_on_images, "draw_detection_grid", draw)
    read = []

    def read_one(place):
        read.append(place)
        return Image.new("RGB", (40 + place, 40)), None

    numbers = list(range(images))
    source = ImageSource("", numbers, [str(number) for number in numbers], read_one, [])
    models = {"a": (tiny_model(), processor)}
    for index, (path, names) in enumerate(draw_detection_pages(source, models, tmp_path, 99, 8, 0.3)):
        assert names == [str(number) for number in numbers[8 * index : 8 * index + 8]] and read[-1] == int(names[-1])
        assert path.parent == tmp_path
    assert {name: len(widths) for name, widths in drawn.items()} == pages
    assert [width for widths in drawn.values() for width in widths] == [40 + number for number in numbers]


def call_script(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, argv)])
    runpy.run_path(str(REPOSITORY / "scripts" / "visualize.py"), run_name="__main__")


def refusal(monkeypatch, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        call_script(monkeypatch, *argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_script(tmp_path, monkeypatch, capsys, processor):
    """Both pictures of a distilled model and its teacher; a folder at a given size; mistakes end in one line."""
    for module in (detection_grid, attention_picture):
        monkeypatch.setattr(module, "DOTS_PER_INCH", 50)  # a small picture is written faster
    make_shapes(tmp_path / "shapes", 3, 3, progress=False)
    student = save(tiny_model(1), processor, tmp_path / "student")
    teacher = save(tiny_model(2, decoder_layers=4, num_queries=9), processor, tmp_path / "teacher")
    second = load_coco_split(*find_coco_split(tmp_path / "shapes", "val")).rows[1]["image_id"]
    data = ["--data_folder", tmp_path / "shapes", "--output_dir", tmp_path / "out", "--first", 2]
    both = ["--model", student, "--compare", teacher, *data]
    call_script(monkeypatch, *both, "--attention", "true", "--image", second, "--score_threshold", 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out' / 'detections.png'} (shapes/val, image ")
    assert lines[1] == f"{tmp_path / 'out' / 'attention.png'} (shapes/val, image {second})"
    sizes = [Image.open(tmp_path / "out" / f"{name}.png").size for name in ("detections", "attention")]
    assert sizes[0][0] == pytest.approx(3 * 3.46 * 50, abs=7)  # ground truth, teacher, student
    assert sizes[1][0] == pytest.approx(5 * 3.06 * 50, abs=7)  # the detection and four layers

    folder = ["--images", tmp_path / "shapes" / "val", "--output_dir", tmp_path / "of_folder", "--first", 2]
    call_script(monkeypatch, "--model", student, *folder, "--short_side", 32, "--long_side", 64)
    assert [path.name for path in (tmp_path / "of_folder").iterdir()] == ["detections.png"]
    other = ConvNextForImageClassification(tiny_config().backbone_config)
    classifier = save(other, processor, tmp_path / "classifier")

    for argv, message in [
        (["--model", classifier, *folder], "'convnext' model; the families that can be students and teachers are"),
        (["--model", student, "--compare", "/no/such/folder", *folder], "compare '/no/such/folder': there is no such"),
        ([*both, "--attention", "true", "--image", 99], "image is 99: shapes/val has 3 images, whose ids lie in"),
        ([*both, "--attention", "true", "--detection", 21], "detection is 21: the student has detections 0..20"),
        ([*both, "--image", 1], "give --attention true too"),
        ([*both, "--score_threshold", 2], "score_threshold is 2.0: it must be in 0..1"),
        ([*both, "--images", tmp_path], "give 'images' or a data set"),
        (["--model", student, "--compare", student, *data], "give two different ones"),
    ]:
        assert message in refusal(monkeypatch, capsys, *argv)
