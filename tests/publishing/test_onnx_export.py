"""The ONNX file computes what PyTorch does at every size, or there is none."""

import contextlib
import gc
import importlib.util
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, SwinConfig, pipeline
from transformers.image_utils import SizeDict

from d3etr_hf.cli import export
from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.errors import CommandLineError, DetectorLoadError, OnnxExportError
from d3etr_hf.evaluation import average_precision_of, predict_detections
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector
from d3etr_hf.publishing import onnx_check, onnx_export
from d3etr_hf.publishing.onnx_check import ExportArguments, compare_with_onnx, export_and_check
from d3etr_hf.publishing.onnx_export import export_onnx, size_for_export
from d3etr_hf.publishing.onnx_precision import refuse_loss
from d3etr_hf.publishing.onnx_record import check_in_words, onnx_snippet
from tests.data.coco_files import coco, write_split
from tests.tiny import TINY_CONFIGS, small_image_processor, tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# batch, height, width: one pixel more and less than a multiple of the strides 8 and 32, multiples, one cell, upright
SIZES = [(1, 64, 64), (2, 65, 97), (3, 63, 128), (1, 8, 40), (2, 200, 71), (5, 33, 64)]
FIGURES = {
    "images": 3,
    "differences": {
        "one_by_one": {"box_pixels": 0.01, "score": 1e-5},
        "other_sizes": {"box_pixels": 0.02, "score": 2e-5},
        "padded_batch": {"box_pixels": 0.03, "score": 3e-6},
    },
    "milliseconds": {"pytorch": 20.0, "onnxruntime": 10.0},
    "threads": 1,
}


def run_script(*argv: str) -> str:
    """What `d3etr export` prints."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["d3etr export", *argv]
    try:
        with contextlib.redirect_stdout(printed):
            export.main()
    finally:
        sys.argv = before
    return printed.getvalue()


def write_run(folder: Path) -> Path:
    """The folder of a run: a perturbed detector, its image processor, and its data, images of two shapes in noise."""
    content = coco(images=[{"id": 7, "file_name": "7.png", "width": 40, "height": 30}])
    content["images"] += [{"id": image, "file_name": f"{image}.png", "width": 30, "height": 52} for image in (3, 9)]
    content["categories"] = [{"id": index, "name": name} for index, name in enumerate(tiny_model().class_names)]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        _, images = write_split(folder / "data", content, split)
        for image in content["images"]:
            noise = generator.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(noise).save(images / image["file_name"])
    model = tiny_model(decoder_layers=2, auxiliary_loss=True)
    with torch.no_grad():
        model.class_labels_classifier.bias += 4.16  # scores on both sides of the snippet's threshold
    model.save_pretrained(folder / "run")
    load_image_processor(None, 64, 96).save_pretrained(folder / "run")
    (folder / "run" / "run.yaml").write_text(f"data_folder: {folder / 'data'}\nlearning_rate: 0.001\n")
    return folder / "run"


def write_padded_run(folder: Path) -> Path:
    """The same of a family whose file is for one size, to which its images are padded: 96 × 96 pixels."""
    run = write_run(folder)
    tiny_model(model_type="deformable_detr", decoder_layers=2).save_pretrained(run)
    small_image_processor("deformable_detr", 64, 96).save_pretrained(run)
    return run


def a_batch(batch: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Random pixels; every image but the first is padded at the right and at the bottom."""
    generator = torch.Generator().manual_seed(height)
    mask = torch.ones(batch, height, width, dtype=torch.int64)
    for image in range(1, batch):
        mask[image, height - 3 * image :] = 0
        mask[image, :, width - 7 * image :] = 0
    pixels = torch.randn(batch, 3, height, width, generator=generator)
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


def an_example(height: int, width: int) -> dict:
    """Random pixels of 64 x 80 of an image that was of this size, without objects."""
    nothing = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}
    labels = {"image_id": torch.tensor([1]), "orig_size": torch.tensor([height, width]), **nothing}
    return {"pixel_values": torch.randn(3, 64, 80), "labels": labels}


@torch.no_grad()
def assert_same_outputs(model, path: Path, inputs: dict[str, torch.Tensor], wanted_scores) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    values = {name: value.numpy() for name, value in inputs.items()}
    logits, scores, boxes = session.run(["logits", "scores", "pred_boxes"], values)
    wanted = model.to_stock()(**inputs)
    assert logits.shape == wanted.logits.shape and boxes.shape == wanted.pred_boxes.shape
    np.testing.assert_allclose(logits, wanted.logits, atol=2e-5, rtol=0)
    np.testing.assert_allclose(boxes, wanted.pred_boxes, atol=2e-6, rtol=0)
    np.testing.assert_allclose(scores, wanted_scores(wanted.logits), atol=2e-5, rtol=0)


def sigmoid_scores(logits: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + (-logits).exp())


def softmax_scores(logits: torch.Tensor) -> torch.Tensor:
    """Of the best class alone; the last output is no object."""
    scores = (logits.exp() / logits.exp().sum(-1, keepdim=True))[..., :-1]
    return torch.where(scores == scores.amax(-1, keepdim=True), scores, 0)


@contextlib.contextmanager
def no_garbage_collection():
    """An export makes millions of objects, for which the collector looks through all of the tests' again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def packages_found(monkeypatch):
    """As if the extra were installed."""
    monkeypatch.setattr(onnx_export, "NEEDED", ())


# what needs no onnx


def test_missing_packages_are_named_with_the_extra(run_folder, monkeypatch):
    monkeypatch.setattr(onnx_export, "NEEDED", ("json", "onnx_absent", "onnxruntime_absent"))
    for call in (
        lambda: run_script(str(run_folder)),
        lambda: export_onnx(tiny_model(), run_folder / "model.onnx", {}),
    ):
        with pytest.raises(OnnxExportError) as caught:
            call()
        message = "an export needs onnx_absent, onnxruntime_absent: pip install 'd3etr_hf[onnx]'"
        assert str(caught.value) == message


def test_arguments():
    (arguments,) = parse_arguments([ExportArguments], ["--folder", "runs/x"])
    assert arguments == ExportArguments(folder="runs/x", output=None, check_images=20)
    with pytest.raises(CommandLineError, match="check_images is 0: it must be at least 1"):
        parse_arguments([ExportArguments], ["--folder", "runs/x", "--check_images", "0"])
    with pytest.raises(CommandLineError, match="'folder' is required"):
        run_script("--check_images", "3")


def test_what_cannot_be_exported_is_refused(run_folder, packages_found, tmp_path, monkeypatch):
    """A Hub id with no output, a folder that tells of no data, one that is absent, Swin, and two gigabytes."""
    with pytest.raises(OnnxExportError, match="'user/student' is no folder here: say with --output where"):
        run_script("user/student")
    with pytest.raises(OnnxExportError, match="--output .* is a folder: name the file, for example model.onnx in it"):
        export_and_check(str(run_folder), str(tmp_path))
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(OnnxExportError, match="bare holds no run.yaml .* give --data_folder"):
        run_script(str(tmp_path / "bare"))
    with pytest.raises(DetectorLoadError, match="there is no such folder"):
        export_and_check(str(tmp_path / "absent"), str(tmp_path / "model.onnx"), 1, DataArguments())
    swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, out_features=["stage2"])
    with pytest.raises(OnnxExportError, match="a 'swin' backbone cannot be exported for images of any size"):
        export_onnx(tiny_model(backbone_config=swin), tmp_path / "model.onnx", {})
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 1000)
    with pytest.raises(OnnxExportError, match="do not fit into one ONNX file"):
        export_onnx(tiny_model(), tmp_path / "model.onnx", {})
    assert not list(tmp_path.glob("*.onnx*"))


@pytest.mark.parametrize("changed", [{"box_pixels": 0.6}, {"score": 0.002}, {"box_pixels": math.nan}])
def test_a_file_that_differs_is_not_kept(run_folder, packages_found, tmp_path, monkeypatch, changed):
    """Whatever lay there stays as it was; what is equal replaces it, with the figures beside it."""
    figures = json.loads(json.dumps(FIGURES))
    figures["differences"]["padded_batch"] |= changed
    monkeypatch.setattr(onnx_check, "export_onnx", lambda model, path, metadata, size: path.write_text("new"))
    monkeypatch.setattr(onnx_check, "compare_with_onnx", lambda model, path, examples, size: figures)
    monkeypatch.setattr(onnx_check, "evaluate_onnx", lambda *arguments: {"AP": 0.25})
    (tmp_path / "model.onnx").write_text("old")
    output = str(tmp_path / "model.onnx")
    with pytest.raises(OnnxExportError, match=r"model.onnx: not written, .* \(padded batch: boxes differ by up to"):
        export_and_check(str(run_folder), output)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"

    figures["differences"] = FIGURES["differences"]
    check = export_and_check(str(run_folder), output)
    assert (tmp_path / "model.onnx").read_text() == "new"
    assert json.loads((tmp_path / "onnx_check.json").read_text()) == {"model.onnx": check}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "onnx_check.json"]


def test_data_and_number_of_images(run_folder, packages_found, tmp_path, monkeypatch):
    """A checkpoint's data are those of its run; flags say otherwise; no more images than there are."""
    seen = []
    monkeypatch.setattr(onnx_check, "export_onnx", lambda model, path, metadata, size: path.write_text("new"))
    monkeypatch.setattr(
        onnx_check, "compare_with_onnx", lambda model, path, examples, size: seen.append(len(examples)) or FIGURES
    )
    checkpoint = run_folder / "checkpoint-2"
    load_detector(str(run_folder)).save_pretrained(checkpoint)
    evaluated = []
    monkeypatch.setattr(onnx_check, "evaluate_onnx", lambda *all: evaluated.append(len(all[2])) or {"AP": 0.25})
    assert "AP" not in export_and_check(str(checkpoint), str(tmp_path / "model.onnx"), 2, ap_images=0)
    check = export_and_check(str(checkpoint), str(tmp_path / "model.onnx"), 50, ap_images=2)
    assert (check["AP"], check["AP_images"]) == (0.25, 2)
    write_split(tmp_path / "other", coco())
    write_split(tmp_path / "other", coco(), "val")
    check = export_and_check(
        str(run_folder), str(tmp_path / "o" / "m.onnx"), 50, DataArguments(str(tmp_path / "other"))
    )
    assert seen == [2, 3, 2] and evaluated == [2]
    assert check["data"] == "other/val" and (tmp_path / "o" / "onnx_check.json").exists()
    assert "AP" not in check  # of other classes than the detector's


def test_words():
    assert check_in_words({"data": "bccd/val", **FIGURES}) == (
        "On 3 images of bccd/val, alone, at other sizes and as a padded batch, boxes differ from PyTorch's by at most "
        "0.03 pixels and scores by 2e-05; an image takes 10.0 ms, with PyTorch 20.0 ms (CPU, 1 threads)."
    )


def test_words_of_another_precision():
    """What it costs, and the size of the file."""
    check = {"data": "x/val", "AP": 0.708, "AP_float32": 0.7113, "AP_images": 1200, "megabytes": 0.64, **FIGURES}
    assert check_in_words(check).endswith("(CPU, 1 threads). AP 70.8, in float32 71.1 (images: 1,200); 0.64 MB.")


@pytest.mark.parametrize(
    ("precision", "changed", "ap", "told"),
    [
        ("fp16", {}, 0.48, None),
        ("fp16", {}, 0.47, "for in fp16 AP is 47.0, and in float32 50.0, on 9 images; rounding may cost 2:"),
        ("int8", {}, 0.41, None),
        ("int8", {}, 0.39, "for in int8 AP is 39.0, .* rounding may cost 10:"),
        ("fp16", {"score": math.nan}, 0.5, "no numbers .other sizes.: this detector's values are too large"),
        ("int8", {"box_pixels": math.inf}, 0.5, "in int8 scores or boxes are no numbers"),
    ],
)
def test_what_rounding_may_cost(precision, changed, ap, told):
    figures = json.loads(json.dumps(FIGURES)) | {"AP": ap, "AP_images": 9}
    figures["differences"]["other_sizes"] |= changed
    context = contextlib.nullcontext() if told is None else pytest.raises(OnnxExportError, match=told)
    with context:
        refuse_loss(figures, {"AP": 0.5}, Path("model.onnx"), precision)


def test_snippets_are_short_programs():
    for repo_id in (None, "user/student"):
        snippet = onnx_snippet(repo_id)
        compile(snippet, "snippet", "exec")
        assert snippet.count("\n") <= 20
    assert 'hf_hub_download("user/student", "model.onnx")' in snippet and 'from_pretrained("user/student"' in snippet


# of what size a family's file is, if its image processor makes images of 64 × 90 pixels, or of 64 × 64
FILE_SIZES = {
    "conditional_detr": None,
    "dab-detr": None,
    "detr": None,
    "table-transformer": None,
    "deformable_detr": (90, 90),
    "lw_detr": (64, 64),
    "deimv2": (64, 64),
    "d_fine": (64, 64),
    "rf_detr": (64, 64),
    "rt_detr": (64, 64),
    "rt_detr_v2": (64, 64),
}


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_size_of_the_file(family):
    """Large enough for all images that the image processor makes, upright ones too; the file says how to pad them."""
    processor = small_image_processor(family, 64, 90)
    detector = tiny_model(model_type=family)
    size = size_for_export(detector, processor)
    assert size == FILE_SIZES[family]
    described = onnx_export.describe_for_onnx(detector, processor, size)
    padding = json.loads(described["padding"])
    for shape in ((300, 90), (90, 300)) if size else ():
        made = processor(np.zeros((*shape, 3), dtype=np.uint8), return_tensors="np", **padding)
        assert made["pixel_values"].shape == (1, 3, *size)
        if padding:
            assert made["pixel_mask"].sum() < size[0] * size[1]


def test_size_of_the_file_is_height_and_width():
    """Of an image processor whose images are wider than high."""
    processor = small_image_processor("deformable_detr", 64, 64)
    processor.size = SizeDict(height=64, width=96)
    assert size_for_export(tiny_model(model_type="deformable_detr"), processor) == (64, 96)


def test_sizes_that_cannot_be_are_refused(tmp_path, packages_found):
    """A long side without bounds, sides that are split into no whole windows, none at all."""
    lw_detr = tiny_model(model_type="lw_detr")
    unbounded = small_image_processor("lw_detr")
    unbounded.size = SizeDict(shortest_edge=64)
    with pytest.raises(OnnxExportError, match="LW-DETR .* bounds no long side: set longest_edge"):
        size_for_export(lw_detr, unbounded)
    odd = small_image_processor("rf_detr", 72)
    with pytest.raises(OnnxExportError, match="RF-DETR cannot be exported for the size .* must be multiples of 16"):
        size_for_export(tiny_model(model_type="rf_detr"), odd)
    with pytest.raises(OnnxExportError, match="LW-DETR cannot be exported for images of any size: say of which"):
        export_onnx(lw_detr, tmp_path / "model.onnx", {})


def test_data_of_another_size_than_the_file_are_refused(tmp_path, packages_found):
    """The file is for the size of the image processor beside the model, and the check must be, too."""
    folder = write_padded_run(tmp_path)
    data = DataArguments(str(tmp_path / "data"), short_side=32, long_side=64)
    with pytest.raises(
        OnnxExportError, match="for images of 96 × 96 pixels, .* the data options make images of 64 × 64 pixels"
    ):
        export_and_check(str(folder), data_arguments=data)


def test_groups_of_a_file_for_one_size():
    """Padded only by a family that reads padding; all images of that size."""
    example = an_example(height=64, width=80)
    alone, batch = onnx_check.groups_of([example], (64, 96), reads_padding=True).items()
    assert (alone[0], batch[0]) == ("one_by_one", "padded_batch")
    assert [each["pixel_values"].shape for each in (*alone[1], *batch[1])] == [(1, 3, 64, 96), (3, 3, 64, 96)]
    assert alone[1][0]["pixel_mask"].sum() == 64 * 80 and not alone[1][0]["pixel_values"][0, ..., 80:].any()
    assert len(batch[1][0]["pixel_mask"].sum((1, 2)).unique()) == 3
    groups = onnx_check.groups_of([example], (64, 80), reads_padding=False)
    assert list(groups) == ["one_by_one", "batch"] and groups["batch"][0]["pixel_mask"].float().mean() == 1
    with pytest.raises(ValueError, match="for a file of 32 x 96"):
        onnx_check.groups_of([example], (32, 96), reads_padding=True)


# what needs onnx, onnxruntime and onnxscript


@pytest.fixture(scope="module")
def onnx():
    """The module; skips where the extra is not installed."""
    for name in PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'd3etr_hf[onnx]'")
    return importlib.import_module("onnx")


@pytest.fixture(scope="module")
def exported(onnx, tmp_path_factory):
    """A run's folder after scripts/export.py, and what that printed."""
    folder = write_run(tmp_path_factory.mktemp("exported"))
    with no_garbage_collection():
        return folder, run_script(str(folder))


@pytest.fixture(scope="module")
def detr(onnx, tmp_path_factory):
    """A DETR with a ResNet, and its ONNX file."""
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    detector = tiny_model(model_type="detr", backbone_config=backbone, decoder_layers=1)
    path = tmp_path_factory.mktemp("detr") / "model.onnx"
    with no_garbage_collection():
        export_onnx(detector, path, {})
    return detector, path


@pytest.mark.parametrize(("family", "layers", "size"), [("rt_detr_v2", 2, (40, 48)), ("lw_detr", 1, (32, 48))])
def test_same_outputs_at_one_size(onnx, tmp_path, family, layers, size):
    """Assertions and len() in the stock model, windows of patches; batches of any number."""
    detector = tiny_model(model_type=family, decoder_layers=layers)
    with no_garbage_collection():
        export_onnx(detector, tmp_path / "model.onnx", {}, size)
    for batch in (1, 3):
        assert_same_outputs(detector, tmp_path / "model.onnx", a_batch(batch, *size), sigmoid_scores)


@pytest.mark.parametrize("size", SIZES)
def test_same_outputs_at_every_size(exported, size):
    model = load_detector(str(exported[0]))
    assert_same_outputs(model, exported[0] / "model.onnx", a_batch(*size), sigmoid_scores)


@pytest.mark.parametrize("size", SIZES)
def test_same_outputs_of_detr_with_resnet(detr, size):
    assert_same_outputs(*detr, a_batch(*size), softmax_scores)


@pytest.fixture(scope="module")
def padded(onnx, tmp_path_factory):
    """A run's folder whose file is for images padded to one size, and its check."""
    folder = write_padded_run(tmp_path_factory.mktemp("padded"))
    with no_garbage_collection():
        return folder, export_and_check(str(folder))


def test_same_outputs_padded_to_one_size(padded, onnx):
    """Two clamps of one value, which the exporter takes for one another, among them."""
    folder, check = padded
    model, path = load_detector(str(folder)), folder / "model.onnx"
    for batch in (1, 3):
        assert_same_outputs(model, path, a_batch(batch, 96, 96), sigmoid_scores)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["takes"] == check["takes"] == "images padded to 96 × 96 pixels"
    assert json.loads(metadata["image_size"]) == {"height": 96, "width": 96}
    assert check["differences"].keys() == {"one_by_one", "padded_batch"}
    assert ", alone and as a padded batch, boxes" in check_in_words(check)


def test_snippet_pads_where_the_file_needs_it(padded, tmp_path, monkeypatch, capsys):
    """What the stock model finds in the padded image."""
    folder, _ = padded
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    picture = Image.open(folder.parent / "data" / "val" / "3.png")
    picture.save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    model, processor = load_detector(".").to_stock(), small_image_processor("deformable_detr", 64, 96)
    image = Image.open("photograph.jpg").convert("RGB")
    size = {"height": 96, "width": 96}
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt", pad_size=size))
    threshold = outputs.logits.sigmoid().median().item()
    found = processor.post_process_object_detection(outputs, threshold, [image.size[::-1]], top_k=21)[0]
    wanted = sorted(zip(found["scores"].tolist(), found["boxes"].tolist(), strict=True))
    capsys.readouterr()
    exec(compile(onnx_snippet().replace("> 0.4", f"> {threshold}"), "snippet", "exec"), {})
    lines = [line.split(" ", 2) for line in capsys.readouterr().out.splitlines()]
    made = sorted((float(score), json.loads(corners)) for _, score, corners in lines)
    assert len(made) == len(wanted) == 10
    for score, corners in made:
        assert any(
            score == pytest.approx(other, abs=0.006) and corners == pytest.approx(box, abs=0.06)
            for other, box in wanted
        )


def test_script_keeps_the_file_with_its_figures(exported):
    folder, printed = exported
    check = json.loads((folder / "onnx_check.json").read_text())["model.onnx"]
    assert printed == check_in_words(check) + "\n"
    assert check["data"] == "data/val" and check["images"] == 3 and check["opset"] == 18
    for group in check["differences"].values():
        assert group["box_pixels"] < 1e-3 and group["score"] < 1e-5
    assert min(check["milliseconds"].values()) > 0
    _, val = load_splits(DataArguments(str(folder.parent / "data")), load_image_processor(str(folder)))
    detections = predict_detections(load_detector(str(folder)), val, 1)
    assert check["AP"] == pytest.approx(average_precision_of(detections, val)["AP"], abs=1e-6)
    assert check["AP_images"] == 3
    assert not list(folder.glob("*.unfinished"))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_another_precision(exported, onnx, tmp_path, monkeypatch, precision):
    """Beside the file in float32, smaller, run as that is; its AP is that of its own detections."""
    import onnxruntime

    folder, _ = exported
    plain = folder / "model.onnx"
    # what tracing takes is tested above
    monkeypatch.setattr(
        onnx_check, "export_onnx", lambda model, path, metadata, size: path.write_bytes(plain.read_bytes())
    )
    shutil.copytree(folder, tmp_path / "run")
    check = export_and_check(str(tmp_path / "run"), precision=precision)
    path = tmp_path / "run" / f"model_{precision}.onnx"
    checks = json.loads((tmp_path / "run" / "onnx_check.json").read_text())
    assert checks.keys() == {"model.onnx", path.name} and checks[path.name] == check
    assert check["precision"] == precision and check["AP_float32"] == checks["model.onnx"]["AP"]
    assert path.stat().st_size < plain.stat().st_size and not list(path.parent.glob("*.unfinished"))
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.INT8) in kinds
    metadata = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert metadata["takes"] == "images of any size"
    model, inputs = load_detector(str(folder)), a_batch(2, 65, 97)
    values = {name: value.numpy() for name, value in inputs.items()}
    _, scores, boxes = onnxruntime.InferenceSession(str(path)).run(["logits", "scores", "pred_boxes"], values)
    with torch.no_grad():
        wanted = model.to_stock()(**inputs)
    assert 1e-7 < np.abs(scores - wanted.logits.sigmoid().numpy()).max() < 0.05
    assert scores.dtype == boxes.dtype == np.float32
    np.testing.assert_allclose(boxes, wanted.pred_boxes, atol=0.05, rtol=0)


@pytest.mark.parametrize("fault", ["graph", "converter"])
def test_a_precision_that_does_not_run_is_one_error(exported, onnx, tmp_path, monkeypatch, fault):
    """An operator that the runtime does not have, and a converter that fails; nothing is left."""
    folder, _ = exported
    plain = (folder / "model.onnx").read_bytes()
    monkeypatch.setattr(onnx_check, "export_onnx", lambda model, path, metadata, size: path.write_bytes(plain))

    def without_operator(source, target, precision):
        model = onnx.load(source)
        next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "NoSuchOperator"
        target.write_bytes(model.SerializeToString())

    def failing(*arguments, **options):
        raise ValueError("two\nlines")

    if fault == "graph":
        monkeypatch.setattr(onnx_check, "convert_precision", without_operator)
    else:
        monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", failing)
    with pytest.raises(OnnxExportError) as caught:
        export_and_check(str(folder), str(tmp_path / "out" / "x.onnx"), precision="int8")
    told = {"graph": "does not run this detector in int8 (", "converter": "cannot convert this detector to int8 (two"}
    assert told[fault] in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_file_says_what_it_needs_and_nothing_of_this_machine(exported, onnx):
    """The exporter writes the path of every source file into every node."""
    folder, _ = exported
    content = (folder / "model.onnx").read_bytes()
    for private in ("site-packages", str(REPOSITORY), str(Path.home()), "/torch/"):
        assert private.encode() not in content
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert texts.pop("takes") == "images of any size"
    metadata = {key: json.loads(text) for key, text in texts.items()}
    assert metadata.keys() == {"id2label", "image_processor", "padding"} and metadata["padding"] == {}
    assert metadata["id2label"] == {"0": "circle", "1": "rectangle", "2": "triangle"}
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    assert metadata["image_processor"] == {key: saved[key] for key in onnx_export.PROCESSOR_KEYS}
    dimensions = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert dimensions == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
        "logits": ["batch", 7, 3],
        "scores": ["batch", 7, 3],
        "pred_boxes": ["batch", 7, 4],
    }


def test_a_tampered_file_is_found_and_not_kept(exported, onnx, tmp_path, monkeypatch):
    """One bias of the box head off by 0.05."""
    folder, _ = exported
    model = onnx.load(folder / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("bbox_predictor.layers.2.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.05), bias.name))
    tampered = model.SerializeToString()
    monkeypatch.setattr(onnx_check, "export_onnx", lambda model, path, metadata, size: path.write_bytes(tampered))
    with pytest.raises(OnnxExportError, match="computes something else than PyTorch"):
        export_and_check(str(folder), str(tmp_path / "model.onnx"))
    assert not list(tmp_path.iterdir())


def test_padded_batch_finds_a_mask_that_is_not_used(exported, monkeypatch):
    """A fault that no single image shows."""
    folder, _ = exported
    original = onnx_check._run_onnx
    monkeypatch.setattr(
        onnx_check,
        "_run_onnx",
        lambda session, batch: original(session, {**batch, "pixel_mask": torch.ones_like(batch["pixel_mask"])}),
    )
    example = an_example(height=64, width=80)
    figures = compare_with_onnx(load_detector(str(folder)), folder / "model.onnx", [example])
    assert figures["differences"]["one_by_one"]["score"] < 1e-5
    assert figures["differences"]["padded_batch"]["score"] > onnx_check.SCORE_TOLERANCE


def test_differences_are_in_pixels_of_the_original_image(exported, monkeypatch):
    """Boxes moved down by 0.1 of an image that was 300 pixels high, and 5000 wide."""
    folder, _ = exported
    original = onnx_check._run_onnx

    def moved(session, batch):
        logits, scores, boxes = original(session, batch)
        return logits, scores, boxes + torch.tensor([0, 0.1, 0, 0])

    monkeypatch.setattr(onnx_check, "_run_onnx", moved)
    example = an_example(height=300, width=5000)
    figures = compare_with_onnx(load_detector(str(folder)), folder / "model.onnx", [example])
    for group in figures["differences"].values():
        assert group["box_pixels"] == pytest.approx(30, rel=0.01) and group["score"] < 1e-5


def test_snippet_finds_what_the_pipeline_finds(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    for path in folder.iterdir():
        if path.suffix in (".onnx", ".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    picture = Image.open(folder.parent / "data" / "val" / "3.png")
    picture.save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(onnx_snippet(), "snippet", "exec"), {})
    lines = [line.split(" ", 2) for line in capsys.readouterr().out.splitlines()]
    found = [(name, float(score), json.loads(corners)) for name, score, corners in lines]
    wanted = pipeline("object-detection", model=".")("photograph.jpg", threshold=0.4)
    assert 0 < len(found) == len(wanted) < 21
    for name, score, corners in found:
        assert any(
            name == item["label"]
            and score == pytest.approx(item["score"], abs=0.006)
            and corners == pytest.approx(list(item["box"].values()), abs=1.1)  # the pipeline cuts off fractions
            for item in wanted
        )
