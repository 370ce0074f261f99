"""Detections and average precision of a whole split."""

from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from d3etr_hf.data import DetectionCollator, DetectionDataset
from d3etr_hf.errors import EvaluationError
from d3etr_hf.evaluation.coco_average_precision import coco_average_precision
from d3etr_hf.evaluation.detections import detect, to_coco_detections
from d3etr_hf.models.detector import Detector


@torch.no_grad()
def predict_detections(
    model: Detector, dataset: DetectionDataset, batch_size: int = 8, title: str = "detecting"
) -> torch.Tensor:
    """Detections of every image, in the data set's order, by one process.

    Args:
        model: it is left in eval mode, on its device.
        dataset: with a `DetectionTransform`.
        batch_size: predictions depend a little on which images share a batch.
        title: of the progress bar.

    Returns:
        (images, 100, 6) float32 on the CPU, rows of `select_detections`.
    """
    model.eval()
    scores = model.scores
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=DetectionCollator())
    detections = []
    for batch in tqdm(loader, desc=title, leave=False):
        batch |= {name: batch[name].to(model.device) for name in ("pixel_values", "pixel_mask")}
        detections.append(detect(model, batch, scores, model.dtype).cpu())
    return torch.cat(detections)


def average_precision_of(
    detections: torch.Tensor, dataset: DetectionDataset, image_ids: Any = None
) -> dict[str, float]:
    """COCO metrics (0..1) of detections on the data set's untouched ground truth.

    Args:
        detections: (images, 100, 6), rows of `select_detections`.
        image_ids: int64 (images,), of the rows; by default the data set's own order.

    Raises:
        EvaluationError: an image of the data set has no row, not even an empty one.
        ValueError: a detection is not finite.
    """
    all_ids = dataset.rows["image_id"]
    image_ids = all_ids if image_ids is None else image_ids
    if missing := sorted({*all_ids} - {int(image_id) for image_id in image_ids}):
        raise EvaluationError(
            f"{len(missing)} of the {len(all_ids)} images of {dataset.name} were not evaluated, the first with id "
            f"{missing[0]}, and would count as images without a detection: an option, or a sampler of your own, "
            "leaves them out"
        )
    return coco_average_precision(
        dataset.ground_truth, to_coco_detections(detections, image_ids, dataset.category_ids)
    )
