"""Image processors: of which class, loaded and new, and RF-DETR's own."""

import inspect
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    ConditionalDetrImageProcessorPil,
    DeformableDetrImageProcessorPil,
    RTDetrImageProcessorPil,
    pipeline,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from d3etr_hf.data.image_sizes import takes_fixed_size
from d3etr_hf.errors import DatasetError, DetectorLoadError, ImageSizeError
from d3etr_hf.models.image_processors import (
    CLASSES,
    RfDetrImageProcessorPil,
    image_processor_class,
    image_processor_of,
    load_image_processor,
)
from d3etr_hf.models.loading import FAMILIES
from tests.tiny import small_image_processor, tiny_model

PACKAGE = Path(inspect.getfile(transformers.models.rf_detr)).parent
STOCK_RF_DETR = (PACKAGE / "image_processing_rf_detr.py").read_text(encoding="utf-8")
NOISE = np.random.default_rng(1).integers(0, 256, (97, 151, 3), dtype=np.uint8)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a model and no image processor."""
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_image_processor_comes_back_with_its_scaling_and_the_size_asked_for(tmp_path):
    saved = load_image_processor(None, 96, 128)
    saved.image_mean = [0.1, 0.2, 0.3]
    saved.save_pretrained(tmp_path)
    as_saved, resized = load_image_processor(str(tmp_path)), load_image_processor(str(tmp_path), 48, 64)
    assert as_saved.image_mean == resized.image_mean == (0.1, 0.2, 0.3)
    assert (as_saved.size["shortest_edge"], as_saved.size["longest_edge"]) == (96, 128)
    assert (resized.size["shortest_edge"], resized.size["longest_edge"]) == (48, 64)


def test_absent_image_processor_is_told_and_a_broken_one_refused(checkpoint, caplog):
    caplog.set_level(logging.WARNING)
    assert load_image_processor(str(checkpoint)) is None
    assert f"{checkpoint} holds no image processor" in caplog.text
    (checkpoint / "preprocessor_config.json").write_text("{nope")
    with pytest.raises(DetectorLoadError, match=f"{checkpoint}: preprocessor_config.json could not be read"):
        load_image_processor(str(checkpoint))


@pytest.mark.parametrize("family", FAMILIES)
def test_image_processor_is_of_the_familys_class(tmp_path, family):
    """Even where the settings come from a teacher of another: a sigmoid's processor reads a DETR wrongly."""
    own = small_image_processor(family, 64, 96)
    others = [small_image_processor(name, 64, 96) for name in FAMILIES if name != family]
    kin = [
        each
        for each in others
        if takes_fixed_size(each) == takes_fixed_size(own) and each.do_normalize == own.do_normalize
    ]
    other = kin[0] if kin else own
    other.save_pretrained(tmp_path)
    made = image_processor_of(family, str(tmp_path))
    assert type(made) is type(own) and dict(made.size) == dict(other.size)
    assert type(image_processor_of(family, None)) is type(made)
    model = tiny_model(0, family)
    model.save_pretrained(tmp_path / "student")
    made.save_pretrained(tmp_path / "student")
    detect = pipeline("object-detection", model=str(tmp_path / "student"), image_processor=made)
    found = detect(Image.new("RGB", (64, 64)), threshold=0.0)
    assert {each["label"] for each in found} <= set(model.class_names)


# as Transformers' example script saves it, of one fixed size, and of a short side within a square
PADDED = [
    {"size": {"max_height": 96, "max_width": 96}},
    {"size": {"height": 96, "width": 96}},
    {"size": {"shortest_edge": 64, "longest_edge": 96}},
]


@pytest.mark.parametrize("settings", PADDED)
def test_padding_of_the_teachers_size_is_not_that_of_another(tmp_path, settings):
    """The stock pipeline would fail at the first image that does not fit into what is inherited."""
    padding = {"do_pad": True, "pad_size": {"height": 96, "width": 96}}
    ConditionalDetrImageProcessorPil(**settings, **padding).save_pretrained(tmp_path)
    inherited = image_processor_of("conditional_detr", str(tmp_path))
    assert dict(inherited.pad_size)["height"] == 96  # nothing contradicts it
    square = "height" in settings["size"]
    size = {"image_size": 128} if square else {"short_side": 96, "long_side": 128}
    student = tmp_path / "student"
    tiny_model().save_pretrained(student)
    for processor in (inherited, image_processor_of("conditional_detr", str(tmp_path), **size)):
        processor.save_pretrained(student)
        detect = pipeline("object-detection", model=str(student))
        for shape in ((64, 48), (48, 64), (150, 151)):
            assert detect(Image.new("RGB", shape), threshold=0.0)
    assert json.loads((student / "preprocessor_config.json").read_text()).get("pad_size") is None


def test_padding_that_was_saved_too_small_is_forgotten(tmp_path):
    """By what went on from such a teacher before; one way round is enough to fail."""
    for height, width, fits in ((96, 128, False), (128, 96, False), (128, 128, True)):
        ConditionalDetrImageProcessorPil(
            size={"shortest_edge": 96, "longest_edge": 128}, do_pad=True, pad_size={"height": height, "width": width}
        ).save_pretrained(tmp_path)
        assert (image_processor_of("conditional_detr", str(tmp_path)).pad_size is not None) == fits


SQUARES = ["d_fine", "deimv2", "lw_detr", "rf_detr", "rt_detr", "rt_detr_v2"]
SHORT_SIDES = ["conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"]


@pytest.mark.parametrize("model_type", SQUARES + SHORT_SIDES)
def test_every_detr_of_transformers_has_an_image_processor(model_type):
    """Those that Transformers' table leaves out, too; each without torchvision."""
    made = load_image_processor(None, model_type=model_type)
    assert takes_fixed_size(made) == (model_type in SQUARES) and made.backend == "pil"
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {})
    assert ("pil" in names) != (model_type in CLASSES)  # one place says it: theirs, or ours where theirs is silent
    assert type(made) is image_processor_class(model_type)


def test_sizes_of_the_other_kind_are_refused_with_the_way_out(tmp_path):
    RTDetrImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(tmp_path / "squares")
    assert load_image_processor(str(tmp_path / "squares"), image_size=64).size["height"] == 64
    with pytest.raises(DatasetError, match="one fixed size, now 96×96 pixels: give image_size instead"):
        load_image_processor(str(tmp_path / "squares"), 64, 96)
    with pytest.raises(DatasetError, match="image_size is 64, but this model takes.*give short_side and long_side"):
        load_image_processor(None, image_size=64)


def test_a_student_of_another_kind_has_pixels_of_its_own(tmp_path):
    """A short side would leave it padding that it does not know; ImageNet's colours are not what it starts from."""
    teacher = ConditionalDetrImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 128})
    teacher.save_pretrained(tmp_path / "detr")
    own = image_processor_of("rt_detr", str(tmp_path / "detr"))
    assert own.to_dict() == RTDetrImageProcessorPil().to_dict()
    # of its own kind it takes all that decides an image's pixels
    RTDetrImageProcessorPil(size={"height": 96, "width": 96}, resample=3).save_pretrained(tmp_path / "rt")
    made = image_processor_of("d_fine", str(tmp_path / "rt"))
    assert (dict(made.size), made.resample) == ({"height": 96, "width": 96}, 3)
    # normalised, where the teacher's are not
    assert image_processor_of("rf_detr", str(tmp_path / "rt")).to_dict() == RfDetrImageProcessorPil().to_dict()


def test_one_class_serves_two_families_of_different_kinds(tmp_path):
    """Deformable DETR's, by the short side, and LW-DETR's, whose checkpoints take squares of 640 pixels."""
    DeformableDetrImageProcessorPil().save_pretrained(tmp_path / "deformable")
    new = image_processor_of("lw_detr", None)
    assert dict(new.size) == {"height": 640, "width": 640}
    new.save_pretrained(tmp_path / "lw")
    # what stock Transformers reads of it, for whom the table names this class
    saved = json.loads((tmp_path / "lw" / "preprocessor_config.json").read_text())
    stock = AutoImageProcessor.from_pretrained(tmp_path / "lw", backend="pil")
    assert saved["image_processor_type"] == IMAGE_PROCESSOR_MAPPING_NAMES["lw_detr"]["torchvision"]
    assert type(stock) is DeformableDetrImageProcessorPil
    assert stock(Image.fromarray(NOISE), return_tensors="pt")["pixel_values"].shape == (1, 3, 640, 640)
    # a teacher's is not that of a student of the other family
    of_student = image_processor_of("lw_detr", str(tmp_path / "deformable"), source_type="deformable_detr")
    assert dict(of_student.size) == {"height": 640, "width": 640}
    of_student = image_processor_of("deformable_detr", str(tmp_path / "lw"), source_type="lw_detr")
    assert dict(of_student.size) == {"shortest_edge": 800, "longest_edge": 1333}
    # a model's own is taken as it is
    assert dict(image_processor_of("lw_detr", str(tmp_path / "deformable")).size)["shortest_edge"] == 800
    assert dict(image_processor_of("deformable_detr", str(tmp_path / "lw")).size)["height"] == 640


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].reads_padding])
def test_padding_is_refused_where_it_is_not_read(tmp_path, family):
    """Else boxes would be those of the padded image, and nothing would say so."""
    own = image_processor_class(family)
    own(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    with pytest.raises(ImageSizeError, match=f"{tmp_path}.*reads no padding.*preprocessor_config.json.*one fixed"):
        image_processor_of(family, str(tmp_path))
    own(size={"height": 64, "width": 96}).save_pretrained(tmp_path)
    assert dict(image_processor_of(family, str(tmp_path)).size) == {"height": 64, "width": 96}


# RF-DETR


@pytest.mark.parametrize("size", [{"height": 56, "width": 56}, {"shortest_edge": 56, "longest_edge": 70}])
def test_rf_detr_pixels_are_those_of_transformers_class(size):
    """Which cannot be run without torchvision, whose resize of floats without antialias is this interpolation."""
    rescaled, resized = "stacked_images = self.rescale(", "size=size, resample=resample, antialias=False)"
    assert 0 < STOCK_RF_DETR.index(rescaled) < STOCK_RF_DETR.index(resized)
    processor = RfDetrImageProcessorPil(size=size)
    made = processor(Image.fromarray(NOISE), do_pad=False, return_tensors="pt")["pixel_values"][0]
    pixels = torch.from_numpy(NOISE).permute(2, 0, 1).float() / 255
    sides = tuple(made.shape[1:])
    assert sides == (56, 56) or sides == (45, 70)
    expected = torch.nn.functional.interpolate(pixels[None], sides, mode="bilinear", antialias=False)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(made, (expected - mean) / std, rtol=0, atol=1e-5)
    # Pillow, which smooths, is far from it
    smoothed = torch.nn.functional.interpolate(pixels[None], sides, mode="bilinear", antialias=True)[0]
    assert (smoothed - expected).abs().max() > 0.2


def test_rf_detr_saved_is_the_stock_class_and_comes_back(tmp_path):
    RfDetrImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    stock = IMAGE_PROCESSOR_MAPPING_NAMES["rf_detr"]["torchvision"]
    assert saved["image_processor_type"] == "RfDetrImageProcessor" == stock
    assert saved["size"] == {"height": 384, "width": 384} and saved["do_normalize"] and saved["do_pad"]
    for name in saved.keys() - {"image_processor_type", "rescale_factor"}:  # which every image processor has
        assert f" {name} = " in STOCK_RF_DETR or f"self.{name} = " in STOCK_RF_DETR, name
    again = load_image_processor(str(tmp_path))
    assert type(again) is RfDetrImageProcessorPil and json.loads(again.to_json_string()) == saved
    assert image_processor_of("rf_detr", str(tmp_path)).to_dict() == again.to_dict()
    with pytest.raises(ValueError, match="resample is 3: RF-DETR's image processor is bilinear"):
        again(Image.fromarray(NOISE), resample=3)
