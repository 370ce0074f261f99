"""Detections of a whole split, by one process."""

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from d3etr_hf.data import DetectionCollator, DetectionDataset
from d3etr_hf.evaluation.coco_average_precision import coco_average_precision
from d3etr_hf.evaluation.detections import select_detections, to_coco_detections


@torch.no_grad()
def predict_detections(
    model: torch.nn.Module, dataset: DetectionDataset, batch_size: int = 8, title: str = "detecting"
) -> torch.Tensor:
    """Detections of every image, in the data set's order.

    Args:
        model: a stock Conditional DETR or ours; it is left in eval mode, on its device.
        dataset: with a `DetectionTransform`.
        batch_size: predictions depend a little on which images share a batch.
        title: of the progress bar.

    Returns:
        (images, 100, 6) float32 on the CPU, rows of `select_detections`.
    """
    model.eval()
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=DetectionCollator())
    detections = []
    for batch in tqdm(loader, desc=title, leave=False):
        pixels = {name: batch[name].to(model.device) for name in ("pixel_values", "pixel_mask")}
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
        outputs = model(**pixels)
        detections.append(select_detections(outputs.logits, outputs.pred_boxes, sizes).cpu())
    return torch.cat(detections)


def average_precision_of(detections: torch.Tensor, dataset: DetectionDataset) -> dict[str, float]:
    """COCO metrics (0..1) of `predict_detections` on the data set's untouched ground truth.

    Raises:
        ValueError: a detection is not finite.
    """
    found = to_coco_detections(detections, dataset.rows["image_id"], dataset.category_ids)
    return coco_average_precision(dataset.ground_truth, found)
