"""Detections through the interface that all detectors share, and where pictures take their images and classes from."""

import copy
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from d3etr_hf.data import DataArguments, DetectionCollator, DetectionTransform
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import DatasetError, DetectorLoadError, PictureError
from d3etr_hf.evaluation import select_detections
from d3etr_hf.models.loading import load_image_processor
from d3etr_hf.visualization import attention_pictures, pictures, visualisation
from d3etr_hf.visualization.visualisation import (
    ChosenImages,
    choose_images,
    common_classes,
    detect,
    detection_columns,
    draw_detection_pages,
    ground_truth_rows,
    load_any_detector,
    model_titles,
    prepare_batch,
    read_folder,
)
from tests.tiny import perturb, tiny_config, tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = {"shortest_edge": 48, "longest_edge": 80}
CLASSES = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}


def noise(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [noise(60, 40, 1), noise(30, 70, 2), noise(200, 150, 3)]


@pytest.fixture
def processor():
    return load_image_processor(None, 48, 80)


def tiny_detr(seed=0) -> DetrForObjectDetection:
    """Another family: a softmax over classes with "no object"; without timm."""
    torch.manual_seed(seed)
    config = DetrConfig(
        backbone_config=tiny_config().backbone_config,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        **CLASSES,
    )
    return perturb(DetrForObjectDetection(config), 0.3).eval()


def save(model, processor, folder) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_detections_are_those_that_evaluation_sees(processor):
    """Guards against another resize or padding than the evaluation's, and against xyxy taken for xywh."""
    model = tiny_model().train()  # dropout is off in the tiny configuration; the mode must change all the same
    found = detect(model, processor, IMAGES, batch_size=2)
    assert not model.training and not found[0].requires_grad
    transform = DetectionTransform(processor)
    target = {"image_id": 1, "boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}
    expected = []
    for chosen in (IMAGES[:2], IMAGES[2:]):
        batch = DetectionCollator()([transform(image, target) for image in chosen])
        with torch.no_grad():
            outputs = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
        expected += select_detections(outputs.logits, outputs.pred_boxes, sizes)
    for rows, wanted in zip(found, expected, strict=True):
        assert rows.shape == (21, 6) and rows.dtype == torch.float32
        torch.testing.assert_close(rows, wanted[:21], atol=1e-3, rtol=1e-5)
    threshold = found[0][4, 4].item()
    above = detect(model, processor, IMAGES[:2], batch_size=2, score_threshold=threshold)[0]
    assert torch.equal(above, found[0][:4])


def test_another_family_is_drawn_by_its_own_rules(tmp_path):
    """Guards against this package's sigmoid, top-k or labels for a model whose scores are a softmax."""
    path = save(tiny_detr(), DetrImageProcessorPil(size=SIZE), tmp_path)
    model, processor = load_any_detector(path)
    assert type(model) is DetrForObjectDetection and type(processor) is DetrImageProcessorPil
    found = detect(model, processor, IMAGES, batch_size=3)
    pixels = [processor(image, return_tensors="pt")["pixel_values"][0] for image in IMAGES]
    height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
    values, mask = torch.zeros(3, 3, height, width), torch.zeros(3, height, width, dtype=torch.int64)
    for index, image in enumerate(pixels):
        values[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = 1
    with torch.no_grad():
        outputs = tiny_detr()(values, mask)
    for index, image in enumerate(IMAGES):
        rows = []
        for logits, (x, y, w, h) in zip(outputs.logits[index], outputs.pred_boxes[index].tolist(), strict=True):
            score, label = logits.softmax(-1)[:3].max(-1)
            corner = (x - w / 2) * image.width, (y - h / 2) * image.height
            rows.append([*corner, w * image.width, h * image.height, score.item(), label.item()])
        rows.sort(key=lambda row: -row[4])
        torch.testing.assert_close(found[index], torch.tensor(rows), atol=1e-3, rtol=1e-4)


def test_a_family_without_a_padding_mask_sees_images_one_by_one():
    """YOLOS would look at the padding, and its boxes would refer to the padded image."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=5,
        **CLASSES,
    )
    model, processor = perturb(YolosForObjectDetection(config)).eval(), YolosImageProcessorPil(size=SIZE)
    together = detect(model, processor, IMAGES, batch_size=3)
    assert len(together[0]) == 5
    for rows, image in zip(together, IMAGES, strict=True):
        assert torch.equal(rows, detect(model, processor, [image])[0])


def test_padding_by_the_processor_itself_is_masked():
    batch = prepare_batch(DetrImageProcessorPil(size=SIZE, pad_size={"height": 96, "width": 96}), IMAGES[:2])
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [48 * 72, 80 * 34]
    assert batch["pixel_mask"][0, :48, :72].all()


def test_diverged_and_unresizable(processor):
    model = tiny_model()
    model.class_labels_classifier.bias.data[1] = float("nan")
    with pytest.raises(PictureError, match="not finite"):
        detect(model, processor, IMAGES)
    with pytest.raises(DatasetError, match="4000×1 pixels cannot be resized"):
        detect(tiny_model(), processor, [noise(4000, 1)])


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
    chosen = ChosenImages(["a"], IMAGES[:1], truth, ["square", "rectangle"])
    models = {"teacher": (other, processor), "student": (model, processor)}
    columns, names = detection_columns(chosen, models)
    assert names == ["square", "rectangle", "Triangle", "circle"]
    assert list(columns) == ["ground truth", "teacher", "student"]
    assert columns["ground truth"][0].tolist() == truth[0].tolist()
    torch.testing.assert_close(columns["teacher"][0], columns["student"][0])
    own = detect(model, processor, IMAGES[:1])[0][:, 5]
    assert columns["student"][0][:, 5].tolist() == [[3, 1, 2][int(label)] for label in own]


def test_folder_in_order_upright_and_of_any_kind(tmp_path, caplog):
    noise(20, 10).save(tmp_path / "b.png")
    Image.fromarray(np.full((6, 8), 65535, dtype=np.uint16)).save(tmp_path / "c.tiff")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(20, 10).save(tmp_path / "a.jpg", exif=exif)
    Image.new("P", (5, 5)).save(tmp_path / "d.gif")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "aa.txt").write_text("no image")
    (tmp_path / "ab.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "folder").mkdir()
    with caplog.at_level(logging.WARNING):
        chosen = read_folder(tmp_path)
    assert chosen.names == ["a.jpg", "b.png", "c.tiff", "d.gif"]
    assert [image.size for image in chosen.images] == [(10, 20), (20, 10), (8, 6), (5, 5)]
    assert all(image.mode == "RGB" for image in chosen.images)
    assert chosen.images[2].getpixel((0, 0)) == (255, 255, 255)  # 16 bits are scaled, not clipped
    assert chosen.ground_truth is None and chosen.class_names == []
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"{tmp_path}: skipped 2 files that are no readable image: aa.txt, ab.jpg"
    assert read_folder(tmp_path, 2).names == ["a.jpg", "b.png"]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="none' *: there is no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(DatasetError, match="it holds no file"):
        read_folder(tmp_path)
    for index in range(7):
        (tmp_path / f"{index}.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"none of its 7 files is a readable image \(0.txt, .*4.txt, \.\.\.\)"):
        read_folder(tmp_path)


def test_images_and_ground_truth_of_either_split(tmp_path):
    make_shapes(tmp_path / "shapes", 4, 3, progress=False)
    data = DataArguments(data_folder=str(tmp_path / "shapes"))
    chosen = choose_images(None, data, "val", 2)
    assert len(chosen.images) == len(chosen.ground_truth) == 2
    assert chosen.class_names == ["circle", "rectangle", "triangle"]
    assert chosen.names[0].startswith("shapes/val, image ")
    assert len(choose_images(None, data, "val", 9).images) == 3
    assert len(choose_images(None, data, "train", 9).images) == 4
    target = {"boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]]), "class_labels": torch.tensor([2])}
    assert ground_truth_rows(target).tolist() == [[1, 2, 3, 6, 1, 2]]
    with pytest.raises(PictureError, match="'images' or a data set .*: not both"):
        choose_images(str(tmp_path), data)
    with pytest.raises(PictureError, match="'images' or a data set .*: neither is there"):
        choose_images(None, DataArguments())


def test_what_is_no_detector_is_refused(tmp_path, processor):
    with pytest.raises(DetectorLoadError, match="compare '/no/such/folder': there is no such folder"):
        load_any_detector("/no/such/folder", "compare")
    classifier = ConvNextForImageClassification(tiny_config().backbone_config)
    path = save(classifier, processor, tmp_path / "classifier")
    with pytest.raises(DetectorLoadError, match=f"model '{path}': no detector could be loaded.*ConvNextConfig"):
        load_any_detector(path)
    tiny_detr().save_pretrained(tmp_path / "bare")
    with pytest.raises(DetectorLoadError, match="bare': no detector .*preprocessor_config.json"):
        load_any_detector(str(tmp_path / "bare"))
    path = save(tiny_detr(), DetrImageProcessorPil(), tmp_path / "partial")
    weights = load_file(f"{path}/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "class_labels" not in k}, f"{path}/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(DetectorLoadError, match=r"2 tensors .* missing .*class_labels_classifier.bias"):
        load_any_detector(path)


def test_missing_timm_is_named_before_the_weights_are_read(tmp_path, monkeypatch):
    DetrConfig(use_timm_backbone=True, backbone="resnet50").save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"needs a package that is not installed: timm, .*'resnet50' \(pip install 'd3etr_hf\[timm\]'\)"
    with pytest.raises(DetectorLoadError, match=message):
        load_any_detector(str(tmp_path))


def test_saved_or_given_image_size(tmp_path, processor):
    path = save(tiny_model(), processor, tmp_path)
    model, saved = load_any_detector(path)
    assert type(model) is AutoModelForObjectDetection.from_pretrained(path).__class__
    assert type(saved) is type(AutoImageProcessor.from_pretrained(path, backend="pil"))
    assert (saved.size["shortest_edge"], saved.size["longest_edge"]) == (48, 80)
    given = load_any_detector(path, short_side=32, long_side=64)[1].size
    assert (given["shortest_edge"], given["longest_edge"]) == (32, 64)


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
def test_eight_images_a_page(tmp_path, monkeypatch, images, pages):
    drawn = {}

    def draw(images, columns, class_names, path, score_threshold):
        assert [image.width for image in images] == [int(rows[0, 0]) for rows in columns["a"]]
        drawn[path.name] = len(images)

    monkeypatch.setattr(visualisation, "draw_detection_grid", draw)
    chosen = [Image.new("RGB", (10 + index, 10)) for index in range(images)]
    columns = {"a": [torch.full((1, 6), 10.0 + index) for index in range(images)]}
    paths = draw_detection_pages(chosen, columns, [], tmp_path)
    assert drawn == pages and [path.name for path in paths] == list(pages)


def call_script(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, argv)])
    runpy.run_path(str(REPOSITORY / "scripts" / "visualize.py"), run_name="__main__")


def refusal(monkeypatch, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        call_script(monkeypatch, *argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_script(tmp_path, monkeypatch, capsys, processor):
    """Both pictures of a distilled model and its teacher; another family's detections; mistakes end in one line."""
    for module in (pictures, attention_pictures):
        monkeypatch.setattr(module, "DOTS_PER_INCH", 50)  # a small picture is written faster
    make_shapes(tmp_path / "shapes", 3, 3, progress=False)
    student = save(tiny_model(1), processor, tmp_path / "student")
    teacher = save(tiny_model(2, decoder_layers=4, num_queries=9), processor, tmp_path / "teacher")
    data = ["--data_folder", tmp_path / "shapes", "--output_dir", tmp_path / "out", "--first", 2]
    both = ["--model", student, "--compare", teacher, *data]
    call_script(monkeypatch, *both, "--attention", "true", "--image", 1, "--score_threshold", 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "out" / "detections.png")
    assert lines[1].startswith(f"{tmp_path / 'out' / 'attention.png'} (shapes/val, image ")
    sizes = [Image.open(tmp_path / "out" / f"{name}.png").size for name in ("detections", "attention")]
    assert sizes[0][0] == pytest.approx(3 * 3.46 * 50, abs=7)  # ground truth, teacher, student
    assert sizes[1][0] == pytest.approx(5 * 3.06 * 50, abs=7)  # the detection and four layers

    detr = save(tiny_detr(), DetrImageProcessorPil(size=SIZE), tmp_path / "detr")
    folder = ["--images", tmp_path / "shapes" / "val", "--output_dir", tmp_path / "of_folder", "--first", 2]
    call_script(monkeypatch, "--model", detr, *folder)
    assert [path.name for path in (tmp_path / "of_folder").iterdir()] == ["detections.png"]

    for argv, message in [
        (["--model", detr, *folder, "--attention", "true"], "is a 'detr' model; only Conditional DETR"),
        ([*both, "--attention", "true", "--image", 2], "image is 2: there are images 0..1, see 'first'"),
        ([*both, "--attention", "true", "--detection", 21], "detection is 21: the student has detections 0..20"),
        ([*both, "--image", 1], "give --attention true too"),
        ([*both, "--score_threshold", 2], "score_threshold is 2.0: it must be in 0..1"),
        ([*both, "--images", tmp_path], "give a folder of 'images' or a data set"),
        (["--model", student, "--compare", student, *data], "give two different ones"),
    ]:
        assert message in refusal(monkeypatch, capsys, *argv)
