"""Detection data: reading, checking, augmenting and batching."""

from d3etr_hf import optional_torchvision  # noqa: F401
from d3etr_hf.data.coco import find_coco_split, load_coco_split
from d3etr_hf.data.collate import DetectionCollator
from d3etr_hf.data.data_arguments import DataArguments, build_augmentation, load_splits, with_side_divisor
from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.hub_datasets import load_hub_split
from d3etr_hf.data.transforms import Augmentation, CropSizes, DetectionTransform
from d3etr_hf.errors import DatasetError

__all__ = [
    "Augmentation",
    "CropSizes",
    "DataArguments",
    "DatasetError",
    "DetectionCollator",
    "DetectionDataset",
    "DetectionTransform",
    "build_augmentation",
    "find_coco_split",
    "load_coco_split",
    "load_hub_split",
    "load_splits",
    "with_side_divisor",
]
