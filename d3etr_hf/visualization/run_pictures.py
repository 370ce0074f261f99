"""The pictures of a card: detections of the first validation images, attention, training curves, instability."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.utils import logging

from d3etr_hf.data import DetectionDataset
from d3etr_hf.errors import PictureError
from d3etr_hf.evaluation import predict_detections
from d3etr_hf.models.detector import Detector
from d3etr_hf.training.teacher import with_classes_of
from d3etr_hf.visualization.attention_picture import draw_attention_of
from d3etr_hf.visualization.detection_grid import draw_detection_grid
from d3etr_hf.visualization.detections_on_images import ground_truth_rows
from d3etr_hf.visualization.instability_picture import draw_instability
from d3etr_hf.visualization.training_curves import draw_training_curves, has_curves

logger = logging.get_logger(__name__)

PICTURED_IMAGES = 6
# a detection whose query no query of the teacher is matched with cannot be shown beside it
MOST_DETECTIONS_TRIED = 20

# title → a detector, and the validation split with that detector's transform
PicturedModels = Mapping[str, tuple[Detector, DetectionDataset]]


def is_drawn(folder: Path) -> bool:
    """Whether the pictures are there that every run has; there may be no attention to be shown."""
    return (folder / "detections.png").exists() and (folder / "curves.png").exists()


def draw_pictures(
    folder: Path, history: Sequence[Mapping] | None, val: DetectionDataset, models: PicturedModels
) -> None:
    """Draw into a run's folder those of its pictures that are not there.

    Args:
        history: the run's `trainer.state.log_history`; None, or one without losses and AP, draws no curves, and one
            without instability no picture of that.
        val: the validation split.
        models: the teacher, if there is one, and the student; without a teacher, or of one with predictions only,
            there is no picture of attention.
    """
    names = ("curves", "detections", "attention", "instability")
    curves, detections, attention, instability = (folder / f"{name}.png" for name in names)
    histories = {folder.resolve().name: history or []}
    if has_curves(histories) and not curves.exists():
        draw_training_curves(histories, curves)
    if not instability.exists():
        draw_instability(history or [], instability)
    if not detections.exists():
        of_classes = {
            title: (with_classes_of(model, val.class_names, title), examples)
            for title, (model, examples) in models.items()
        }
        draw_detections_of(of_classes, val, detections)
    have_attention = not any(model.predictions_only for model, _ in models.values())
    if len(models) > 1 and have_attention and not attention.exists():
        draw_attention_of_run(models, val, attention)


def draw_attention_of_run(models: PicturedModels, val: DetectionDataset, path: Path) -> None:
    """Where teacher and student look for the first validation image's best detection that both have."""
    detectors = {title: model for title, (model, _) in models.items()}
    processors = {title: examples.transform.image_processor for title, (_, examples) in models.items()}
    for detection in range(MOST_DETECTIONS_TRIED):
        try:
            return draw_attention_of(val.read_image(0), detectors, processors, path, val.class_names, detection)
        except PictureError as error:
            reason = error
    logger.warning(f"no picture of attention: {reason}")


def draw_detections_of(models: PicturedModels, val: DetectionDataset, path: Path) -> None:
    """A grid of the first images of a split: ground truth, then each detector.

    Args:
        models: detectors of the split's classes.
        val: the split.
        path: the PNG to write.
    """
    first = range(min(PICTURED_IMAGES, len(val)))
    shown = val.with_transform(None)
    columns = {"ground truth": [ground_truth_rows(shown[index]["target"]) for index in first]}
    for title, (model, examples) in models.items():
        columns[title] = list(predict_detections(model, examples.select(first), len(first), title))
    draw_detection_grid([val.read_image(index) for index in first], columns, val.class_names, path)
