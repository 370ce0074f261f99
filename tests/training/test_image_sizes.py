"""Images that a model cannot take are refused when the trainer is made, and not in the middle of a run."""

import pytest
import torch
from transformers import ConditionalDetrImageProcessorPil, RTDetrImageProcessorPil

from d3etr_hf.data import Augmentation, DetectionDataset, DetectionTransform, find_coco_split, load_coco_split
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import ImageSizeError
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.outputs import GroupRequest
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import tiny_model

SQUARES = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
SHORT_SIDE = ConditionalDetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
NO_TEACHER = {"auxiliary_queries": "none", "adaptive_matching": False}
PADDED = r"keeps an image's proportions \(its size is {'longest_edge': 96, 'shortest_edge': 64}\).*one fixed size"
WITHOUT_PADDING = [name for name in FAMILIES if not FAMILIES[name].reads_padding]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, DetectionDataset]:
    folder = make_shapes(tmp_path_factory.mktemp("shapes"), 2, 2, image_size=64, progress=False)
    return {split: load_coco_split(*find_coco_split(folder, split)) for split in ("train", "val")}


@pytest.fixture
def build(shapes, tmp_path):
    """A trainer of two families; the data sets' transforms by the role of the data set."""

    def made(student, teacher=None, train=None, val=None, own=None, of_teacher=None, **options):
        options |= {} if teacher else NO_TEACHER
        args = D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
        return D3etrTrainer(
            model=tiny_model(1, student),
            args=args,
            teacher=tiny_model(2, teacher) if isinstance(teacher, str) else teacher,
            teacher_processing_class=of_teacher,
            processing_class=own,
            train_dataset=None if train is None else shapes["train"].with_transform(train),
            eval_dataset=None if val is None else shapes["val"].with_transform(val),
        )

    return made


@pytest.mark.parametrize("family", ["lw_detr", "rf_detr"])
def test_sizes_that_windows_do_not_divide(build, family):
    """Sides are multiples of 16 for these models."""

    def drawing(*sides):
        return DetectionTransform(SQUARES, Augmentation(batch_sizes=[(side, side) for side in sides]))

    of_72 = RTDetrImageProcessorPil(size={"height": 72, "width": 72})
    trainer = build(family, train=drawing(48, 80), val=DetectionTransform(SQUARES))
    assert trainer.model.side_divisor == 16
    other = trainer.eval_dataset.with_transform(DetectionTransform(of_72))
    with pytest.raises(ImageSizeError, match="eval_dataset has, for the student, an image of 72 x 72"):
        trainer.evaluate(other)
    with pytest.raises(ImageSizeError, match="train_dataset has, for the student, an image of 72 x 72 .* of 16;"):
        build(family, train=drawing(48, 72))
    with pytest.raises(ImageSizeError, match="eval_dataset has, for the student, an image of 72 x 72"):
        build(family, val=DetectionTransform(of_72))
    # a teacher is shown the student's images, if it has none of its own, and in training alone
    with pytest.raises(ImageSizeError, match="train_dataset has, for the teacher, an image of 72 x 72"):
        build("rt_detr", family, train=drawing(48, 72))
    with pytest.raises(ImageSizeError, match="train_dataset has, for the teacher, an image of 72 x 72"):
        build("rt_detr", family, train=DetectionTransform(SQUARES, None, of_72))
    build("rt_detr", family, train=DetectionTransform(of_72, None, SQUARES), val=DetectionTransform(of_72))


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_sizes_that_levels_do_not_double(build, family):
    """Whatever is let through, the stock class takes; a power of two between is where it fails."""
    model = tiny_model(1, family)
    stock, taken = model.to_stock(), []
    for height, width in [(side, 64) for side in range(56, 73)] + [(64, side) for side in range(56, 73)]:
        try:
            model.check_image(height, width)
        except ImageSizeError:
            continue
        stock(pixel_values=torch.randn(1, 3, height, width))
        taken.append((height, width))
    assert taken == [(56, 64), (64, 64), (72, 64), (64, 56), (64, 64), (64, 72)]
    with pytest.raises(RuntimeError):
        stock(pixel_values=torch.randn(1, 3, 60, 64))
    of_60 = DetectionTransform(RTDetrImageProcessorPil(size={"height": 60, "width": 60}))
    with pytest.raises(ImageSizeError, match="an image of 60 x 60 pixels: .* must be multiples of 8; resize"):
        build(family, train=of_60)


@pytest.mark.parametrize("family", ["rt_detr", "d_fine"])
def test_images_of_another_size_than_anchors_are_for(family):
    """Its anchors are made once, in evaluation; training makes them for each batch."""
    model = tiny_model(1, family, anchor_image_size=[64, 48])
    model(torch.randn(1, 3, 64, 48), request=GroupRequest())
    with pytest.raises(
        ImageSizeError,
        match="an image of 64 x 64 pixels: anchor_image_size in its config.json holds it to 48 x 64 pixels",
    ):
        model(torch.randn(1, 3, 64, 64), request=GroupRequest())
    model.train()(torch.randn(2, 3, 64, 64), request=GroupRequest())


def test_rf_detr_takes_squares_only(build):
    oblong = RTDetrImageProcessorPil(size={"height": 64, "width": 80})
    build("lw_detr", train=DetectionTransform(oblong))
    with pytest.raises(ImageSizeError, match="an image of 80 x 64 pixels: RF-DETR's backbone takes squares only"):
        build("rf_detr", train=DetectionTransform(oblong))


@pytest.mark.parametrize("family", WITHOUT_PADDING)
def test_padding_for_a_student_that_reads_none(build, family):
    padded, squares = DetectionTransform(SHORT_SIDE), DetectionTransform(SQUARES)
    for name, options in {
        "the student's image processor": {"own": SHORT_SIDE},
        "the image processor by which train_dataset makes images for the student": {"train": padded},
        "the image processor by which eval_dataset makes images for the student": {"train": squares, "val": padded},
    }.items():
        with pytest.raises(ImageSizeError, match=f"{name} {PADDED}"):
            build(family, **options)
    build(family, train=squares, val=squares, own=SQUARES)


def test_padding_for_a_teacher_that_reads_none(build):
    """Also where it sees the student's images; not where it has its own, or no step runs it."""
    padded, both = DetectionTransform(SHORT_SIDE), DetectionTransform(SHORT_SIDE, None, SQUARES)
    with pytest.raises(ImageSizeError, match=f"by which train_dataset makes images for the teacher {PADDED}"):
        build("detr", "rt_detr", train=padded)
    with pytest.raises(ImageSizeError, match=f"the teacher's image processor {PADDED}"):
        build("detr", "rt_detr", train=both, of_teacher=SHORT_SIDE)
    build("detr", "rt_detr", train=both, val=padded, own=SHORT_SIDE, of_teacher=SQUARES)
    build("detr", "rt_detr", train=padded, **NO_TEACHER)
    # one of no family is given its boxes back in shares of the image
    build("detr", OtherDetector(tiny_model(2, "conditional_detr").to_stock()), train=padded)
