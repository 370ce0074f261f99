"""`predict` finds what the stock pipeline finds, in every family, and says which image is broken."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers import AutoImageProcessor, YolosImageProcessorPil, pipeline

import d3etr_hf
from d3etr_hf.errors import DatasetError, DetectorLoadError
from d3etr_hf.evaluation.image_detections import Predictor
from d3etr_hf.models.loading import FAMILIES
from tests.models.test_other_detector import yolos
from tests.tiny import small_image_processor, tiny_model


def noise(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path):
    """One that lies and asks to be turned, a narrow one, and one with transparency."""
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(90, 60, 1).save(folder / "a.jpg", exif=exif, quality=95)
    noise(50, 120, 2).save(folder / "b.png")
    noise(64, 64, 3).convert("RGBA").save(folder / "c.webp", lossless=True)
    return folder


@pytest.fixture
def detector(tmp_path) -> str:
    return save(tiny_model(3), small_image_processor(), tmp_path / "detector")


def save(model, processor, folder) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def assert_as_the_pipeline(path, processor, photos):
    stock = pipeline("object-detection", model=path, image_processor=processor)
    files = sorted(photos.iterdir())
    # between two scores, so that a rounding error decides nothing, and within what each stock class keeps
    scores = sorted((row["score"] for file in files for row in stock(str(file), threshold=0.0)), reverse=True)
    gaps = [scores[index] - scores[index + 1] for index in range(2, 6)]
    cut = 2 + gaps.index(max(gaps))
    threshold = (scores[cut] + scores[cut + 1]) / 2
    ours = d3etr_hf.predict(path, photos, threshold)
    assert [each["file"] for each in ours] == [str(file) for file in files]
    assert (ours[0]["width"], ours[0]["height"]) == (60, 90)  # turned
    for file, each in zip(files, ours, strict=True):
        wanted = sorted(stock(str(file), threshold=threshold), key=lambda row: -row["score"])
        assert [row["label"] for row in each["detections"]] == [row["label"] for row in wanted]
        for row, other in zip(each["detections"], wanted, strict=True):
            assert row["score"] == pytest.approx(other["score"], abs=1e-4)
            # whole pixels there, cut off
            corners = [other["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")]
            assert row["box"] == pytest.approx(corners, abs=1.01)
    assert sum(len(each["detections"]) for each in ours) == cut + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_stock_pipeline(tmp_path, photos, family):
    """Guards another resize, padding, class or box format than the stock model's own, and images left lying."""
    processor = small_image_processor(family)
    path = save(tiny_model(3, family), processor, tmp_path / "detector")
    assert_as_the_pipeline(path, processor, photos)


def test_a_detector_of_no_family_as_the_stock_pipeline(tmp_path, photos):
    processor = YolosImageProcessorPil(size={"height": 64, "width": 64})
    path = save(yolos(), processor, tmp_path / "detector")
    assert_as_the_pipeline(path, AutoImageProcessor.from_pretrained(path, backend="pil"), photos)


def test_a_detector_without_an_image_processor(tmp_path, photos):
    yolos().save_pretrained(tmp_path / "yolos")
    with pytest.raises(DetectorLoadError, match="model .*yolos' has no preprocessor_config.json"):
        d3etr_hf.predict(tmp_path / "yolos", photos)


def test_batches_change_predictions_little(detector, photos):
    """An image among others is padded, and its boxes stay those of the image."""
    alone, together = (d3etr_hf.predict(detector, photos, 0.0, batch_size=size) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert len(one["detections"]) == len(other["detections"]) == 21
        (first, *_), (best, *_) = one["detections"], other["detections"]
        assert first["score"] == pytest.approx(best["score"], abs=0.05)


def test_broken_images(detector, photos, caplog):
    """One that is none is told before anything is detected; one that is cut off, when its turn comes."""
    whole = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[: len(whole) // 2])
    handed_out = []
    with pytest.raises(DatasetError, match=r"b.png: the image cannot be read \(.*truncated"):
        for path, *_ in Predictor(detector, batch_size=3)(sorted(photos.iterdir())):
            handed_out.append(path.name)
    assert handed_out == ["a.jpg"]  # though its batch was not full
    (photos / "aa.jpg").write_text("no image")
    (photos / "ab.jpg").write_text("none either")
    with pytest.raises(DatasetError, match=r"aa.jpg: the image cannot be .* So 1 others, the next .*ab.jpg"):
        d3etr_hf.predict(detector, photos)
    with caplog.at_level(logging.WARNING):
        found = d3etr_hf.predict(detector, photos, skip_broken_images=True)
    assert [Path(each["file"]).name for each in found] == ["a.jpg", "c.webp"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "left out 2 files that are no readable images",
        "left out 1 files that are no readable images",
    ]


def test_a_detector_of_many_queries_finds_as_many(tmp_path):
    """More than the hundred detections that COCO counts."""
    noise(64, 64).save(tmp_path / "a.png")
    path = save(tiny_model(num_queries=130), small_image_processor(), tmp_path / "detector")
    assert len(d3etr_hf.predict(path, tmp_path / "a.png", threshold=0.0)[0]["detections"]) == 130
