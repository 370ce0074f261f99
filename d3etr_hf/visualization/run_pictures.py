"""The pictures of a card: detections of the first validation images, attention, and the training curves."""

from pathlib import Path

from transformers.utils import logging

from d3etr_hf.data import DetectionDataset
from d3etr_hf.errors import PictureError
from d3etr_hf.evaluation import predict_detections
from d3etr_hf.publishing.run_folder import PublishedRun, read_json
from d3etr_hf.runs.output_folder import HISTORY
from d3etr_hf.training.compatibility import with_classes_of
from d3etr_hf.visualization.attention_pictures import draw_attention_of
from d3etr_hf.visualization.pictures import draw_detection_grid, draw_training_curves
from d3etr_hf.visualization.visualisation import ground_truth_rows

logger = logging.get_logger(__name__)

PICTURED_IMAGES = 6
# a detection whose query no query of the teacher is matched with cannot be shown beside it
MOST_DETECTIONS_TRIED = 20


def is_drawn(folder: Path) -> bool:
    """Whether the pictures are there that every run has; there may be no attention to be shown."""
    return (folder / "detections.png").exists() and (folder / "curves.png").exists()


def draw_pictures(run: PublishedRun) -> None:
    """Draw into the run's folder what is not there; `measure_run` has taken away what is of other weights."""
    history = read_json(run.folder / HISTORY)
    curves, detections, attention = (run.folder / f"{name}.png" for name in ("curves", "detections", "attention"))
    if history and not curves.exists():
        draw_training_curves({run.folder.resolve().name: history}, curves)
    if not detections.exists():
        models = {"student": (run.student, run.val)}
        if run.teacher is not None:
            teacher = with_classes_of(run.teacher, run.val.class_names, "teacher")
            models = {"teacher": (teacher, run.teacher_val), **models}
        draw_detections_of(models, run.val, detections)
    if run.teacher is not None and not attention.exists():
        draw_attention_of_run(run, attention)


def draw_attention_of_run(run: PublishedRun, path: Path) -> None:
    """Where teacher and student look for the first validation image's best detection that both have."""
    own = run.val.transform.image_processor
    models = {"teacher": run.teacher, "student": run.student}
    processors = {"teacher": run.teacher_processor or own, "student": own}
    for detection in range(MOST_DETECTIONS_TRIED):
        try:
            return draw_attention_of(run.val.read_image(0), models, processors, path, run.val.class_names, detection)
        except PictureError as error:
            reason = error
    logger.warning(f"no picture of attention: {reason}")


def draw_detections_of(models: dict, val: DetectionDataset, path: Path) -> None:
    """A grid of the first images of a split: ground truth, then each detector.

    Args:
        models: title → a detector of the split's classes, and the split with that detector's transform.
        val: the split.
        path: the PNG to write.
    """
    first = range(min(PICTURED_IMAGES, len(val)))
    shown = val.with_transform(None)
    columns = {"ground truth": [ground_truth_rows(shown[index]["target"]) for index in first]}
    for title, (model, examples) in models.items():
        columns[title] = list(predict_detections(model, examples.select(first), len(first), title))
    draw_detection_grid([val.read_image(index) for index in first], columns, val.class_names, path)
