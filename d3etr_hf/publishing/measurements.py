"""`metrics.json`: everything a card says, measured once and kept beside the model.

The card is written from this file alone, so that a second run gives the same card. What was not measured is not in it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import logging

from d3etr_hf.compatibility import class_index_by_name
from d3etr_hf.data import DetectionDataset, DetectionTransform
from d3etr_hf.environment import describe_environment
from d3etr_hf.evaluation import average_precision_of, predict_detections
from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.loading import class_names_of, keep_classes, load_detector, load_image_processor
from d3etr_hf.output_folder import RESULTS, write_json

from .cost import count_cost, measure_milliseconds
from .privacy import anonymise
from .run_folder import (
    PublishedRun,
    PublishError,
    describe_data,
    describe_training,
    hash_of_weights,
    links_of_run,
    read_configuration,
    read_json,
)

logger = logging.get_logger(__name__)

METRICS = "metrics.json"
PROGRESS_KEYS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "parameters", "steps", "seconds")


def is_measured(folder: Path, compared: Mapping[str, str]) -> bool:
    """Whether `metrics.json` is there, of these weights, and holds these titles."""
    known = read_json(folder / METRICS)
    return (
        known is not None
        and known["weights"] == hash_of_weights(folder)
        and compared.keys() <= known.get("compared", {}).keys()
    )


def measure_run(run: PublishedRun, compared: Mapping[str, str] | None = None, again: bool = False) -> dict:
    """The content of `metrics.json`, measured where it is not there already for these weights.

    Args:
        run: the finished run.
        compared: title → folder or Hub id of further detectors for the results table, such as the student alone.
        again: measure anew what has been measured.

    Returns:
        `student` and, as far as they exist, `teacher` and `compared` (title → the same): COCO `metrics` in 0..1,
        parameters, FLOPs and milliseconds (see `cost`), steps and seconds of training; `data`; `training`; `links`;
        `environment` of the measurement; `weights`, the SHA-256 of the student's.

    Raises:
        PublishError: the run recorded no evaluation.
        DetectorLoadError, IncompatibleTeacherError: a detector cannot be loaded, or knows other classes.
    """
    target, compared = run.folder / METRICS, compared or {}
    if again or not is_measured(run.folder, {}):
        configuration = read_configuration(run.folder)
        known = {
            "name": run.folder.resolve().name,
            **_measure_models(run, configuration.get("per_device_eval_batch_size", 8)),
            "data": describe_data(run.train, run.val),
            "training": describe_training(run, configuration),
            "links": links_of_run(configuration, run.teacher_name),
            "environment": describe_environment(),
            "weights": hash_of_weights(run.folder),
        }
    else:
        known = read_json(target)
    rows = dict(known.get("compared", {}))
    for title, path in compared.items():
        if title not in rows:
            rows[title] = _measure_compared(title, path, run.val)
    if rows:
        known["compared"] = rows
    write_json(target, anonymise(known))
    # as a second run would read it
    return read_json(target)


def _measure_models(run: PublishedRun, batch_size: int) -> dict:
    """Student and teacher: metrics, cost, and both timed by turns."""
    results = run.record(RESULTS)
    metrics = {name: value for name, value in results.items() if name not in PROGRESS_KEYS}
    if "AP" not in metrics:
        raise PublishError(f"{run.folder / RESULTS} holds no AP: a card needs a validation split with objects")
    models = {"student": (_on_device(run.student), run.val)}
    rows = {"student": {"metrics": metrics}}
    if run.teacher is not None:
        teacher = _on_device(run.teacher)
        models["teacher"] = (teacher, run.teacher_val)
        metrics = _evaluate(teacher, run.teacher_val, batch_size, "teacher")
        rows["teacher"] = {"name": run.teacher_name, "metrics": metrics}
        rows["teacher"] |= _length_of_training(run.teacher_name)
    timed = {}
    for role, (model, val) in models.items():
        stock = model.to_stock()
        pixels = val[0]["pixel_values"][None].to(model.device)
        rows[role] |= count_cost(stock, pixels)
        timed[role] = (stock, pixels)
    for role, milliseconds in measure_milliseconds(timed).items():
        rows[role]["milliseconds"] = milliseconds
    return rows


def _measure_compared(title: str, path: str, val: DetectionDataset) -> dict:
    """A further detector's metrics on the same validation split, with its own image processor."""
    model = _on_device(load_detector(path, title))
    batch_size = (_configuration_beside(path) or {}).get("per_device_eval_batch_size", 8)
    parameters = sum(parameter.numel() for parameter in model.to_stock().parameters())
    processor = load_image_processor(path)
    if processor is not None:
        val = val.with_transform(DetectionTransform(processor))
    metrics = _evaluate(model, val, batch_size, title)
    return {"metrics": metrics, "parameters": parameters, **_length_of_training(path)}


def _evaluate(
    model: D3etrConditionalDetrForObjectDetection, val: DetectionDataset, batch_size: int, title: str
) -> dict[str, float]:
    """COCO metrics of a detector whose classes include the data's."""
    detections = predict_detections(with_classes_of(val, model, title), val, batch_size, title)
    return average_precision_of(detections, val)


def with_classes_of(
    val: DetectionDataset, model: D3etrConditionalDetrForObjectDetection, role: str
) -> D3etrConditionalDetrForObjectDetection:
    """The detector, or where it has other classes a copy with its head reduced to the data's, by name."""
    if class_names_of(model.config) == val.class_names:
        return model
    index = class_index_by_name(model.config, val.class_names, role)
    model = copy.deepcopy(model)
    keep_classes(model, index, val.class_names)
    return model


def _on_device(model: D3etrConditionalDetrForObjectDetection) -> D3etrConditionalDetrForObjectDetection:
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def _configuration_beside(path: str) -> dict | None:
    return read_configuration(Path(path)) if (Path(path) / RESULTS).exists() else None


def _length_of_training(path: str) -> dict:
    """Steps and seconds, where the detector's folder is that of a run; with those of the run that it went on from."""
    results = read_json(Path(path) / RESULTS)
    if results is None:
        return {}
    length = {name: results[name] for name in ("steps", "seconds") if name in results}
    start = read_configuration(Path(path)).get("model")
    if start is None:
        return length
    before = _length_of_training(start)
    return {name: value + before[name] for name, value in length.items() if name in before}
