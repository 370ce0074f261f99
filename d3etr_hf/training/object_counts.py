"""More objects in an image than a detector can find, or than evaluation counts: a ceiling that nobody sees."""

from collections.abc import Mapping

import numpy as np
from torch.utils.data import Dataset
from transformers.utils import logging

from d3etr_hf.data import DetectionDataset
from d3etr_hf.evaluation.detections import MOST_DETECTIONS
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.other_detector import OtherDetector

logger = logging.get_logger(__name__)

REMEDY = "Give the model more queries (num_queries in its configuration), or cut such images into parts."


def warn_of_more_objects(
    student: Detector, teacher: Detector | OtherDetector | None, datasets: Mapping[str, Dataset | None]
) -> None:
    """One warning with the numbers of `describe_more_objects`.

    Args:
        student: the model that is trained or evaluated.
        teacher: None where there is none; of one whose queries are not known nothing is said.
        datasets: as `named_datasets` gives them; what is no `DetectionDataset` is passed over.
    """
    queries = {"the model's": student.query_count}
    if teacher is not None and teacher.query_count:
        queries["the teacher's"] = teacher.query_count
    found = []
    for role, dataset in datasets.items():
        if isinstance(dataset, DetectionDataset):
            evaluated = role != "train_dataset"
            # a teacher is not evaluated
            found += describe_more_objects(
                dataset, dict(list(queries.items())[:1]) if evaluated else queries, evaluated
            )
    if found:
        logger.warning(f"{'; '.join(found)}. {REMEDY}")


def describe_more_objects(dataset: DetectionDataset, queries: Mapping[str, int], evaluated: bool) -> list[str]:
    """Where images of a split hold more objects than can be found or are counted: a part of a sentence each.

    Args:
        dataset: the split.
        queries: how many there are, each of which finds at most one object, by whose they are.
        evaluated: whether average precision is computed of it, which counts 100 detections of an image.
    """
    limits = {f"{whose} {count} queries": count for whose, count in queries.items()}
    if evaluated:
        limits[f"the {MOST_DETECTIONS} detections of an image that evaluation counts"] = MOST_DETECTIONS
    counts = dataset.object_counts()
    return [told for name, limit in limits.items() if (told := _beyond(counts, limit, name, dataset.name))]


def _beyond(counts: np.ndarray, limit: int, name: str, dataset: str) -> str:
    """What a limit leaves out, in words; empty where it leaves out nothing."""
    images = int((counts > limit).sum())
    if not images:
        return ""
    share = np.minimum(counts, limit).sum() / counts.sum()
    return (
        f"{dataset}: {images} of {len(counts)} images hold more objects than {name}, up to {counts.max()}, so at most "
        f"{100 * share:.0f} % of all objects can be found"
    )
