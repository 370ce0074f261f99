"""The models and batches that are timed: random weights and random images of the right size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from d3etr_hf.models.detector import HEADS, Detector
from d3etr_hf.models.loading import ModelArguments, build_model, read_model_options
from d3etr_hf.outputs.targets import Targets, pack


@dataclass(frozen=True)
class Size:
    """One setting of the benchmark.

    Attributes:
        teacher, student: YAML files with the fields of their configurations.
        batch: images a step.
        height, width: pixels; in batches of more than one every second image is padded by a twelfth on both sides,
            if `padded`.
        classes: number of classes.
        objects: ground-truth boxes per image.
        teacher_side: side of the squares that a teacher with pixels of its own sees; None where it sees the student's.
        queries, layers: of teacher and student; None leaves their files' own.
    """

    teacher: str
    student: str
    batch: int
    height: int
    width: int
    classes: int
    objects: int
    queries: int | None = None
    layers: int | None = None
    padded: bool = True
    teacher_side: int | None = None


def _squares(name: str, side: int, teacher_side: int | None = None) -> Size:
    """A public pair, "teacher -> student", on squares of its own resolution."""
    teacher, student = (f"configs/coco/{part}_model.yaml" for part in name.split(" -> "))
    return Size(teacher, student, 2, side, side, classes=80, objects=7, padded=False, teacher_side=teacher_side)


def _short_sides(name: str) -> Size:
    """A public pair on images of a short side of 800."""
    teacher, student = (f"configs/coco/{part}_model.yaml" for part in name.split(" -> "))
    return Size(teacher, student, 2, 800, 1066, classes=91, objects=7)


# one of each family, as its checkpoints are published
FAMILY_PAIRS = {
    "rf_detr": _squares("rf_detr_large -> rf_detr_nano", 384, teacher_side=704),
    "d_fine": _squares("dfine_xlarge -> dfine_nano", 640),
    "rt_detr": _squares("rtdetr_r101vd -> rtdetr_r18vd", 640),
    "detr": _short_sides("detr_r101 -> detr_r50"),
    "deformable_detr": _short_sides("deformable_r50 -> deformable_r18"),
    "dab_detr": _short_sides("dab_r50 -> dab_r18"),
}
SIZES = {
    "shapes": Size(
        "configs/shapes/teacher_model.yaml", "configs/shapes/student_model.yaml", 16, 96, 96, classes=3, objects=3
    ),
    "real": Size("configs/coco/r101_model.yaml", "configs/coco/r50_model.yaml", 2, 480, 640, classes=91, objects=7),
}


def on_gpu(size: Size) -> Size:
    """The setting of a GPU: a real batch and the paper's evaluation size."""
    return size if size.height == size.width else replace(size, batch=8, height=800, width=1066)


def make_detector(path: str, size: Size, seed: int, class_names: Sequence[str] | None = None) -> Detector:
    """A detector whose predictions spread over image and classes, as a trained one's do (assignment time depends)."""
    torch.manual_seed(seed)
    options = dict(read_model_options(ModelArguments(model_config=path)))
    if size.queries is not None:
        options["num_queries"] = size.queries
    if size.layers is not None:
        options["decoder_layers"] = size.layers
    class_names = class_names or [f"class {index}" for index in range(size.classes)]
    model = build_model(ModelArguments(model_config=options), list(class_names))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if model.role_of(name) == HEADS:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif name.endswith("layer.2.normalization.weight"):
                tensor.fill_(0.2)  # a random ResNet under frozen batch norm doubles its activations in every block
    return model


def stock_twin(model: Detector) -> PreTrainedModel:
    """A stock model with its own tensors of the same values, computing auxiliary losses."""
    config = type(model.config).from_dict(model.config.to_dict() | {"auxiliary_loss": True})
    stock = model.stock_class(config)
    stock.load_state_dict(model.to_stock().state_dict(), strict=True)
    trained = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(trained[name].requires_grad)
    return stock


def make_batch(size: Size, seed: int = 0) -> dict:
    """A batch as `DetectionCollator` makes it: `pixel_values` `(B, 3, H, W)`, `pixel_mask` `(B, H, W)`, `targets` and
    `labels`."""
    generator = torch.Generator().manual_seed(seed)
    pixel_mask = torch.ones(size.batch, size.height, size.width, dtype=torch.int64)
    if size.padded:
        pixel_mask[1::2, size.height - size.height // 12 :] = 0
        pixel_mask[1::2, :, size.width - size.width // 12 :] = 0
    pixel_values = torch.randn(size.batch, 3, size.height, size.width, generator=generator) * pixel_mask[:, None]
    centres = torch.rand(size.batch, size.objects, 2, generator=generator) * 0.6 + 0.2
    sides = torch.rand(size.batch, size.objects, 2, generator=generator) * 0.3 + 0.05
    classes = torch.randint(size.classes, (size.batch, size.objects), generator=generator)
    boxes = torch.cat([centres, sides], dim=-1)
    objects = [{"class_labels": classes[image], "boxes": boxes[image]} for image in range(size.batch)]
    labels = [
        {"image_id": image, "objects": size.objects, "orig_size": [size.height, size.width]}
        for image in range(size.batch)
    ]
    batch = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "targets": pack(objects), "labels": labels}
    if size.teacher_side is not None:
        side = size.teacher_side
        batch["teacher_pixel_values"] = torch.randn(size.batch, 3, side, side, generator=generator)
        batch["teacher_pixel_mask"] = torch.ones(size.batch, side, side, dtype=torch.int64)
    return batch


def stock_labels(batch: dict) -> list[dict]:
    """The ground truth of a batch as stock models take it: per image `class_labels` `(n,)` and `boxes` `(n, 4)`."""
    targets = Targets.from_packed(batch["targets"], [label["objects"] for label in batch["labels"]])
    return [
        {"class_labels": targets.class_labels[image, :count], "boxes": targets.boxes[image, :count]}
        for image, count in enumerate(targets.counts)
    ]
