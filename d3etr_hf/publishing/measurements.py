"""`metrics.json`: everything a card says, measured once and kept beside the model.

The card is written from this file alone, so that a second run gives the same card. What was not measured is not in it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import logging

from d3etr_hf.data import DetectionDataset, DetectionTransform
from d3etr_hf.errors import PublishError
from d3etr_hf.evaluation import average_precision_of, best_thresholds, predict_detections
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector
from d3etr_hf.publishing.inference_cost import count_cost, measure_milliseconds
from d3etr_hf.publishing.licenses import licenses_of
from d3etr_hf.publishing.privacy import write_published_json
from d3etr_hf.publishing.run_folder import (
    PublishedRun,
    describe_data,
    describe_training,
    hash_of_weights,
    read_configuration,
    read_json,
    remove_pictures,
)
from d3etr_hf.runs.environment import describe_environment
from d3etr_hf.runs.output_folder import CONFIGURATION, ENVIRONMENT, RESULTS
from d3etr_hf.training.teacher import with_classes_of

logger = logging.get_logger(__name__)

METRICS = "metrics.json"


def read_metrics(folder: Path) -> dict | None:
    """What lies in a run's `metrics.json`; None where there is none.

    Raises:
        PublishError: the file is another tool's, of an earlier version, or damaged.
    """
    try:
        known = read_json(folder / METRICS)
    except ValueError as error:
        raise PublishError(f"{folder / METRICS} is no JSON ({error}): remove it, and publish again") from error
    if known is None:
        return None
    if not (isinstance(known, dict) and {"weights", "student", "data"} <= known.keys()):
        raise PublishError(f"{folder / METRICS} is not of `d3etr publish`: move it away, and publish again")
    if "family" not in known["student"]:
        raise PublishError(f"{folder / METRICS} is of an earlier version: move it away, and publish again")
    return known


def is_measured(folder: Path, compared: Mapping[str, str] | None) -> bool:
    """Whether `metrics.json` is of these weights, and holds these detectors; None for those that it holds."""
    known = read_metrics(folder)
    if known is None or known["weights"] != hash_of_weights(folder):
        return False
    return compared is None or compared.keys() == _rows_that_hold(known, compared).keys()


def select_rows(folder: Path, compared: Mapping[str, str] | None) -> dict:
    """The metrics of a measured run with the rows of these detectors alone, in the file too; None keeps all."""
    known = read_metrics(folder)
    return _write(folder, known, _rows_that_hold(known, compared))


def measure_run(run: PublishedRun, compared: Mapping[str, str] | None = None, again: bool = False) -> dict:
    """The content of `metrics.json`, measured where it is not there already for these weights.

    Args:
        run: the finished run.
        compared: title → folder or Hub id of further detectors for the results table, such as the student alone;
            None for those that are measured already, on the same data and beside the same student.
        again: measure anew what has been measured.

    Returns:
        `student` and, as far as they exist, `teacher` and `compared` (title → the same): COCO `metrics` in 0..1,
        `thresholds` of the student (see `best_thresholds`), `family`, parameters, FLOPs and milliseconds (see
        `inference_cost`), steps and seconds of training; `data`; `training`; `links`; `licenses` of the teacher and of
        what was started from; `environment` of the measurement; `weights`, the SHA-256 of the student's.

    Raises:
        PublishError: the run recorded no evaluation.
        DetectorLoadError, IncompatibleTeacherError: a detector cannot be loaded, or knows other classes.
    """
    measured = None if run.data_moved or not is_measured(run.folder, None) else read_metrics(run.folder)
    if compared is None and measured is None:
        _warn_of_lost_rows(run.folder)
    if again or measured is None:
        remove_pictures(run.folder)
        configuration = read_configuration(run.folder)
        known = {
            "name": run.folder.resolve().name,
            **_measure_models(run, configuration.get("per_device_eval_batch_size", 8)),
            "data": describe_data(run.train, run.val),
            "training": describe_training(run, configuration),
            "links": (run.record(ENVIRONMENT) or {}).get("links", {}),
            "licenses": licenses_of(teacher=run.teacher_name, started_from=configuration.get("model")),
            "environment": describe_environment(),
            "weights": hash_of_weights(run.folder),
        }
    else:
        known = measured
    if compared is None:
        return _write(run.folder, known, {} if measured is None else _rows_that_hold(measured, None))
    rows = _rows_that_hold(known, compared)
    for title, path in compared.items():
        if title not in rows:
            rows[title] = _measure_compared(title, path, run.val)
    return _write(run.folder, known, {title: rows[title] for title in compared})


def _warn_of_lost_rows(folder: Path) -> None:
    """Of which detectors nothing is known any more: they were measured beside other weights, or on other data."""
    if rows := (read_metrics(folder) or {}).get("compared"):
        logger.warning(
            f"{folder}: {', '.join(rows)} was measured beside other weights or on other data, and is left out of the "
            "results: name it again by --compare"
        )


def _write(folder: Path, known: dict, rows: dict) -> dict:
    """Keep the metrics with these further detectors; as a second run would read them."""
    content = {name: value for name, value in known.items() if name != "compared"}
    write_published_json(folder / METRICS, content | ({"compared": rows} if rows else {}))
    return read_metrics(folder)


def _rows_that_hold(known: dict, compared: Mapping[str, str] | None) -> dict:
    """The rows that were measured of these very detectors, None for all; one whose folder is gone still holds."""
    rows = known.get("compared", {})
    if compared is None:
        return dict(rows)
    return {
        title: rows[title]
        for title, path in compared.items()
        if title in rows and (rows[title]["weights"] == _identity(path) or not Path(path).exists())
    }


def _identity(path: str) -> str:
    return hash_of_weights(Path(path)) if Path(path).is_dir() else path


def _recorded_metrics(run: PublishedRun) -> dict[str, float] | None:
    """What the run measured at its end, if of these weights and data; None where that is not known.

    Raises:
        PublishError: the results are of other weights, or there are none.
    """
    results = run.record(RESULTS)
    of_weights = results.get("weights")
    if of_weights is not None and of_weights != hash_of_weights(run.folder):
        raise PublishError(
            f"{run.folder / RESULTS} was measured with other weights than lie beside it: put those of the run back, "
            "or train again"
        )
    if of_weights is None or run.data_moved:
        return None
    metrics = {name: value for name, value in results.items() if name.startswith(("AP", "AR"))}
    if "AP" not in metrics:
        raise PublishError(f"{run.folder / RESULTS} holds no AP: a card needs a validation split with objects")
    return metrics


def _measure_student(run: PublishedRun, batch_size: int) -> dict:
    """The student's metrics, the thresholds that it is best used with, and how long it was trained.

    Raises:
        PublishError: see `_recorded_metrics`, or the validation split has no objects.
    """
    metrics, val = _recorded_metrics(run), run.val
    student = with_classes_of(run.student, val.class_names, "student")
    detections = predict_detections(student, val, batch_size, "student")
    metrics = average_precision_of(detections, val) if metrics is None else metrics
    if "AP" not in metrics:
        raise PublishError(f"{val.name} has no objects: a card needs a validation split with some")
    thresholds = {"thresholds": best_thresholds(detections, val)}
    return {"metrics": metrics, **thresholds, **_length_of_training(str(run.folder))}


def _measure_models(run: PublishedRun, batch_size: int) -> dict:
    """Student and teacher: metrics, family, cost, and both timed by turns."""
    for model, _ in run.models.values():
        _on_device(model)
    rows = {"student": _measure_student(run, batch_size)}
    rows["student"]["backbone"] = run.student.backbone_type
    if run.teacher is not None:
        metrics = _evaluate(run.teacher, run.teacher_val, batch_size, "teacher")
        rows["teacher"] = {"name": run.teacher_name, "metrics": metrics}
        rows["teacher"] |= _length_of_training(run.teacher_name)
        rows["teacher"]["taught_at"] = run.taught_at
    timed = {}
    for title, (model, val) in run.models.items():
        role = title if title in rows else "student"
        pixels = val[0]["pixel_values"][None].to(model.device)
        rows[role]["family"] = {"title": model.title, "tag": model.tag, "citation": model.citation}
        rows[role] |= count_cost(model, pixels)
        timed[role] = (model.to_stock(), pixels)
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
    return {
        "metrics": metrics,
        "parameters": parameters,
        "weights": _identity(path),
        **_length_of_training(path),
    }


def _evaluate(model: Detector, val: DetectionDataset, batch_size: int, title: str) -> dict[str, float]:
    """COCO metrics of a detector whose classes include the data's."""
    detections = predict_detections(with_classes_of(model, val.class_names, title), val, batch_size, title)
    return average_precision_of(detections, val)


def _on_device(model: Detector) -> Detector:
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def _configuration_beside(path: str) -> dict | None:
    folder = Path(path)
    return read_configuration(folder) if all((folder / name).exists() for name in (RESULTS, CONFIGURATION)) else None


def _length_of_training(path: str) -> dict:
    """Steps and seconds, where the detector's folder is that of a run; with those of the run that it went on from."""
    configuration = _configuration_beside(path)
    if configuration is None:
        return {}
    results = read_json(Path(path) / RESULTS)
    length = {name: results[name] for name in ("steps", "seconds") if name in results}
    if "model" not in configuration:
        return length
    before = _length_of_training(configuration["model"])
    return {name: value + before[name] for name, value in length.items() if name in before}
