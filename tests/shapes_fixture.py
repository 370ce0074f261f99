"""A tiny shapes data set and trainers over it."""

import torch

from d3etr_hf.data import Augmentation, DetectionDataset, DetectionTransform, find_coco_split, load_coco_split
from d3etr_hf.models.loading import load_image_processor
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import tiny_model

SIDE = 64


def load_shapes(folder, split, augmented=False, side=SIDE) -> DetectionDataset:
    """One split of a shapes folder with a transform, without augmentation unless asked for."""
    processor = load_image_processor(None, side, side)
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
    return D3etrTrainer(
        model=tiny_model(seed=2) if student is None else student,
        args=args,
        teacher=tiny_model(seed=1) if teacher == "default" else teacher,
        train_dataset=load_shapes(folder, "train") if train is None else train,
        eval_dataset=load_shapes(folder, "val"),
        processing_class=load_image_processor(None, SIDE, SIDE),
        callbacks=callbacks,
    )


def weights_of(model) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
