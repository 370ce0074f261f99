"""A tiny shapes data set and trainers over it."""

import json
from pathlib import Path

import torch
from PIL import Image

from d3etr_hf.data import Augmentation, DetectionDataset, DetectionTransform, find_coco_split, load_coco_split
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import TINY_CONFIGS, small_image_processor, tiny_model

SIDE = 64


def load_shapes(folder, split, augmented=False, side=SIDE, family="conditional_detr") -> DetectionDataset:
    """One split of a shapes folder with the transform of a family, without augmentation unless asked for."""
    processor = small_image_processor(family, side, side)
    augmentation = Augmentation([side], side) if augmented else None
    return load_coco_split(*find_coco_split(folder, split)).with_transform(DetectionTransform(processor, augmentation))


def shapes_trainer(
    folder, output, student=None, teacher="default", train=None, callbacks=None, **options
) -> D3etrTrainer:
    """A trainer of tiny models; without a teacher for `teacher=None`."""
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if teacher is None:
        defaults |= {"auxiliary_queries": "none", "adaptive_matching": False}
    args = D3etrTrainingArguments(output_dir=str(output), **(defaults | options))
    student = tiny_model(seed=2) if student is None else student
    model_type = student.config.model_type
    family = model_type if model_type in TINY_CONFIGS else "conditional_detr"  # a toy sees as the first of them
    return D3etrTrainer(
        model=student,
        args=args,
        teacher=tiny_model(seed=1) if teacher == "default" else teacher,
        train_dataset=load_shapes(folder, "train", family=family) if train is None else train,
        eval_dataset=load_shapes(folder, "val", family=family),
        processing_class=small_image_processor(family, SIDE, SIDE),
        callbacks=callbacks,
    )


def weights_of(model) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def keep_objects(folder, split: str, counts: list[int]) -> None:
    """Leave only the first objects of each image in a shapes folder's annotations: as many as `counts` says."""
    path = Path(folder) / "annotations" / f"{split}.json"
    content, kept = json.loads(path.read_text()), []
    for image, count in zip(content["images"], counts, strict=True):
        kept += [region for region in content["annotations"] if region["image_id"] == image["id"]][:count]
    path.write_text(json.dumps(content | {"annotations": kept}))


def crop_every_other(folder, split: str, width: int, height: int) -> None:
    """Make every second image of a shapes folder smaller, and cut its boxes to what is left of it.

    The sizes then differ within a batch, which must be padded.
    """
    path = Path(folder) / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    smaller = content["images"][1::2]
    for image in smaller:
        place = Path(folder) / split / image["file_name"]
        Image.open(place).crop((0, 0, width, height)).save(place)
        image |= {"width": width, "height": height}
    cut, kept = {image["id"] for image in smaller}, []
    for region in content["annotations"]:
        if region["image_id"] in cut:
            x, y, w, h = region["bbox"]
            w, h = min(x + w, width) - x, min(y + h, height) - y
            region |= {"bbox": [x, y, w, h], "area": w * h}
        if min(region["bbox"][2:]) > 0:
            kept.append(region)
    path.write_text(json.dumps(content | {"annotations": kept}))
