"""Detections of any Transformers detector on the images of a folder or a data set, ready to be drawn side by side."""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import ExifTags, Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from d3etr_hf.data import DataArguments, DetectionCollator, load_splits
from d3etr_hf.data.images import ORIENTATIONS_THAT_SWAP_SIDES, read_rgb
from d3etr_hf.errors import DatasetError, DetectorLoadError, PictureError
from d3etr_hf.models.loading import class_names_of, load_image_processor
from d3etr_hf.visualization.pictures import draw_detection_grid

logger = logging.get_logger(__name__)

ROWS_A_PAGE = 8
LONGEST_TITLE = 30  # characters that fit over a column


@dataclass(frozen=True)
class ChosenImages:
    """What is to be drawn: RGB images and their names; what only a data set has is None and empty for a folder.

    Attributes:
        ground_truth: per image (boxes, 6): x, y, width, height in pixels, 1, label.
        class_names: the name of each label of the ground truth.
    """

    names: list[str]
    images: list[Image.Image]
    ground_truth: list[Tensor] | None
    class_names: list[str]


def choose_images(folder: str | None, data: DataArguments, split: str = "val", first: int = 6) -> ChosenImages:
    """The first images of a folder, or of a split ("train" or "val") of the data set that `data` names.

    Raises:
        PictureError: both are named, or neither.
        DatasetError: they cannot be read.
    """
    has_data = any((data.data_folder, data.dataset_name, data.train_annotations))
    if has_data == (folder is not None):
        both = "not both" if has_data else "neither is there"
        raise PictureError(f"give a folder of 'images' or a data set (data_folder, dataset_name, or paths): {both}")
    if folder is not None:
        return read_folder(folder, first)
    # only images and boxes are read from the splits, so any image processor will do
    train, val = load_splits(data, load_image_processor(None))
    chosen = {"train": train, "val": val}[split].with_transform(None)
    examples = [chosen[index] for index in range(min(first, len(chosen)))]
    return ChosenImages(
        names=[f"{chosen.name}, image {example['target']['image_id']}" for example in examples],
        images=[example["image"] for example in examples],
        ground_truth=[ground_truth_rows(example["target"]) for example in examples],
        class_names=chosen.class_names,
    )


def read_folder(folder: str | Path, first: int | None = None) -> ChosenImages:
    """The first images of a folder in order of their names, upright; subfolders and hidden files are passed over.

    What is no readable image is skipped, with one warning.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"images {str(folder)!r}: there is no such folder")
    names, images, skipped = [], [], []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if len(images) == first:
            break
        try:
            images.append(_read_upright(path))
            names.append(path.name)
        except DatasetError:
            skipped.append(path.name)
    shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    if not images:
        found = f"none of its {len(skipped)} files is a readable image ({shown})" if skipped else "it holds no file"
        raise DatasetError(f"images {str(folder)!r}: {found}; give a folder that has images in it, not in subfolders")
    if skipped:
        logger.warning(f"{folder}: skipped {len(skipped)} files that are no readable image: {shown}")
    return ChosenImages(names, images, None, [])


def _read_upright(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            lying = image.getexif().get(ExifTags.Base.Orientation, 1) in ORIENTATIONS_THAT_SWAP_SIDES
            width, height = image.size[::-1] if lying else image.size
    # as in read_rgb: what Pillow's decoders raise on files that are damaged, or no images
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: no readable image ({error})") from error
    return read_rgb(path, width, height, str(path))


def ground_truth_rows(target: dict) -> Tensor:
    """The boxes (n, 4) xyxy and class_labels (n,) of a target as rows (n, 6): x, y, width, height, score 1, label."""
    boxes, labels = target["boxes"], target["class_labels"]
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], torch.ones(len(boxes), 1), labels[:, None]], dim=1)


def load_any_detector(
    path: str, role: str = "model", short_side: int | None = None, long_side: int | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A detector of whatever family that Transformers knows, in float32, with the image processor saved beside it.

    Args:
        path: a folder or Hub id.
        role: what it is for, as the errors call it.
        short_side, long_side: the size in pixels to resize to, instead of the saved one.

    Raises:
        DetectorLoadError: it is no detector, is incomplete, or needs a package that is not installed.
    """
    what = f"{role} {path!r}"
    if not Path(path).exists() and path.count("/") != 1:
        raise DetectorLoadError(f"{what}: there is no such folder, and it is no Hub id (owner/name)")
    size = {} if short_side is None else {"size": {"shortest_edge": short_side, "longest_edge": long_side}}
    try:
        # some families have no backbone of their own kind, and their configuration no such field
        backbone = AutoConfig.from_pretrained(path).to_dict().get("backbone_config") or {}
        if backbone.get("model_type") == "timm_backbone" and importlib.util.find_spec("timm") is None:
            raise ImportError(f"timm, for its backbone {backbone['backbone']!r} (pip install 'd3etr_hf[timm]')")
        # training and evaluation use Pillow's processors
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **size)
        model, info = AutoModelForObjectDetection.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except ImportError as error:
        raise DetectorLoadError(f"{what} needs a package that is not installed: {str(error).strip()}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DetectorLoadError(
            f"{what}: no detector could be loaded from there ({reason}); give a folder or Hub id with the "
            "config.json, weights and preprocessor_config.json of an object detection model"
        ) from error
    if info["missing_keys"]:
        raise DetectorLoadError(
            f"{what}: {len(info['missing_keys'])} tensors of a detector are missing from the checkpoint, the first "
            f"{sorted(info['missing_keys'])[:3]}: it is incomplete, or was trained for another task"
        )
    return model, image_processor


def prepare_batch(image_processor: BaseImageProcessor, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What models take: images processed one by one, then padded together.

    Returns:
        `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64, 1 on the image, 0 on padding.

    Raises:
        DatasetError: an image cannot be resized.
    """
    processed = []
    for image in images:
        try:
            processed.append(image_processor(image, return_tensors="pt"))
        except ValueError as error:
            raise DatasetError(
                f"an image of {image.width}×{image.height} pixels cannot be resized ({error}): take it out, or raise "
                "`long_side`"
            ) from error
    batch = DetectionCollator()([{"pixel_values": each["pixel_values"][0], "labels": None} for each in processed])
    for mask, each in zip(batch["pixel_mask"], processed, strict=True):
        if "pixel_mask" in each:  # the processor may have padded the image itself
            own = each["pixel_mask"][0]
            mask[: own.shape[0], : own.shape[1]] = own
    return {name: batch[name] for name in ("pixel_values", "pixel_mask")}


@torch.no_grad()
def detect(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    batch_size: int = 8,
    score_threshold: float = 0.0,
) -> list[Tensor]:
    """Detections of a model of any family, through the interface that all families share.

    Args:
        model: for object detection; it runs on its own device, and is left in eval mode.
        image_processor: the model's own; images: RGB, of any sizes.
        batch_size: predictions depend a little on which images share a batch. A family that takes no mask of the
            padding is given one image at a time.
        score_threshold: 0..1; lower scores are left out.

    Returns:
        Per image (k, 6) float32 on the CPU, highest score first: x, y, width, height in pixels of the image, score,
        label.

    Raises:
        PictureError: the model's outputs are not finite.
    """
    model.eval()
    takes_mask = "pixel_mask" in inspect.signature(model.forward).parameters
    step = batch_size if takes_mask else 1
    detections = []
    for start in tqdm(range(0, len(images), step), desc="detecting", unit="batch", leave=False):
        chosen = images[start : start + step]
        batch = prepare_batch(image_processor, chosen)
        inputs = {"pixel_values": batch["pixel_values"].to(model.device, model.dtype)}
        if takes_mask:
            inputs["pixel_mask"] = batch["pixel_mask"].to(model.device)
        outputs = model(**inputs)
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        if not (outputs.logits.isfinite().all() and outputs.pred_boxes.isfinite().all()):
            raise PictureError("the model's outputs are not finite: it has diverged; take an earlier checkpoint")
        sizes = torch.tensor([(image.height, image.width) for image in chosen], device=model.device)
        results = image_processor.post_process_object_detection(outputs, threshold=score_threshold, target_sizes=sizes)
        for result in results:
            boxes, scores, labels = (result[name].cpu() for name in ("boxes", "scores", "labels"))
            rows = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores[:, None], labels[:, None]], dim=1)
            detections.append(rows[scores.argsort(descending=True, stable=True)])
    return detections


def common_classes(*class_names: Sequence[str]) -> tuple[list[str], list[Tensor]]:
    """One list of classes for data and models whose labels differ, by name (case and surrounding space aside).

    Args:
        class_names: per source the name of each of its labels.

    Returns:
        Every name once, in order of appearance; per source int64 (C,), the place of each of its labels in that list.
    """
    places, names, indices = {}, [], []
    for source in class_names:
        for name in source:
            if places.setdefault(str(name).strip().casefold(), len(names)) == len(names):
                names.append(str(name))
        indices.append(torch.tensor([places[str(name).strip().casefold()] for name in source], dtype=torch.int64))
    return names, indices


def relabelled(detections: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows (k, 6) with every label replaced by its place `index[label]` in the common list of classes."""
    return [torch.cat([rows[:, :5], index[rows[:, 5].long()][:, None].to(rows)], dim=1) for rows in detections]


def model_titles(*paths: str) -> list[str]:
    """What pictures call the models: the folders' names, with as many parent folders as tell them apart.

    Raises:
        PictureError: two are the same.
    """
    parts = [(Path(path).resolve() if Path(path).exists() else Path(path)).parts for path in paths]
    for length in range(1, 1 + max(map(len, parts))):
        titles = ["/".join(part[-length:]) for part in parts]
        # a checkpoint of a run in progress: its number alone says little
        if len(set(titles)) == len(titles) and not any(title.startswith("checkpoint-") for title in titles):
            short = [title if len(title) <= LONGEST_TITLE else f"{title[:12]}…{title[-17:]}" for title in titles]
            return short if len(set(short)) == len(short) else titles
    raise PictureError(f"the models are {', '.join(paths)}: give two different ones")


def detection_columns(
    chosen: ChosenImages,
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]],
    batch_size: int = 8,
    score_threshold: float = 0.0,
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """The columns of `draw_detection_grid`, ground truth first, then the models by title; and their class names."""
    own_names = [class_names_of(model.config) for model, _ in models.values()]
    names, (of_data, *of_models) = common_classes(chosen.class_names, *own_names)
    columns = {} if chosen.ground_truth is None else {"ground truth": relabelled(chosen.ground_truth, of_data)}
    for (title, (model, processor)), index in zip(models.items(), of_models, strict=True):
        columns[title] = relabelled(detect(model, processor, chosen.images, batch_size, score_threshold), index)
    return columns, names


def draw_detection_pages(
    images: Sequence[Image.Image], columns: Mapping, class_names: Sequence[str], folder: Path, score_threshold=0.4
) -> list[Path]:
    """`draw_detection_grid` to `detections.png`, or to `detections_1.png`, ... of eight images each; the paths."""
    paths = []
    for start in range(0, len(images), ROWS_A_PAGE):
        rows = slice(start, start + ROWS_A_PAGE)
        page = "" if len(images) <= ROWS_A_PAGE else f"_{len(paths) + 1}"
        paths.append(folder / f"detections{page}.png")
        part = {title: detections[rows] for title, detections in columns.items()}
        draw_detection_grid(images[rows], part, class_names, paths[-1], score_threshold)
    return paths
