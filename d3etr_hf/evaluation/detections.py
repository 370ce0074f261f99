"""From a detector's raw outputs to detections in COCO's result format."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3etr_hf.outputs import OWN, GroupRequest, Scores

# A detection row without a detection: fewer (query, class) pairs than `top_k` exist.
EMPTY_ROW_SCORE = -1.0
MOST_DETECTIONS = 100  # of an image, as in COCO's evaluation


def detect(
    model: torch.nn.Module, batch: Mapping[str, Any], scores: Scores, dtype: torch.dtype, top_k: int = 100
) -> Tensor:
    """Detections of one batch, as training and evaluation alike find them.

    Args:
        model: a `Detector`, wrapped for distributed training or not.
        batch: from `DetectionCollator`, on the model's device.
        scores: how the model's class logits are read.
        dtype: of the model's weights.
        top_k: rows an image; evaluation counts a hundred, as COCO does.

    Returns:
        (B, top_k, 6) float32, rows of `select_detections`.
    """
    output = model(batch["pixel_values"].to(dtype), batch["pixel_mask"], request=GroupRequest())
    group = output.groups[OWN]
    sizes = torch.tensor([label["orig_size"] for label in batch["labels"]])
    return select_detections(scores, group.logits[-1], group.boxes[-1], sizes, top_k)


def select_detections(
    scores: Scores, logits: Tensor, boxes: Tensor, original_sizes: Tensor, top_k: int = MOST_DETECTIONS
) -> Tensor:
    """Selects the `top_k` highest (query, class) scores of each image.

    There is no score threshold. Whether one query may appear with several classes is the scores' business. All
    arithmetic is float32, whatever precision comes in.

    Args:
        scores: how the logits are read.
        logits: (B, N, ·) floating point, raw class logits.
        boxes: (B, N, 4) floating point, cxcywh in 0..1 of the unpadded image.
        original_sizes: (B, 2) int64, (height, width) of the original images in pixels.
        top_k: rows per image.

    Returns:
        (B, top_k, 6) float32, highest score first. A row is x, y, width, height (COCO xywh, pixels of the original
        image, not clipped to it), score in 0..1, class label in 0..C-1. Rows left over, where there are fewer
        detections than `top_k`, have score -1 and zeros elsewhere; `to_coco_detections` leaves them out.

    Raises:
        ValueError: shapes that do not belong together, or `top_k` below 1.
    """
    _check_shapes(logits, boxes, original_sizes, top_k)
    batch_size, query_count = logits.shape[:2]
    # Ranked by what does not saturate: the sigmoid of large logits would tie unequal ones.
    ranking = scores.ranking(logits.float())
    class_count = ranking.shape[-1]
    kept = min(top_k, query_count * class_count)
    best, pair_indices = ranking.flatten(1).topk(kept, dim=1)
    query_indices = pair_indices.div(class_count, rounding_mode="floor")
    probabilities = scores.probabilities(logits.float()).flatten(1).gather(1, pair_indices)

    centre_and_size = boxes.float().gather(1, query_indices.unsqueeze(-1).expand(-1, -1, 4))
    centre, size = centre_and_size.split(2, dim=-1)
    width_height = original_sizes.to(boxes.device).flip(1).float().unsqueeze(1)
    top_left = (centre - size / 2) * width_height

    labels = pair_indices % class_count
    rows = torch.cat(
        [top_left, size * width_height, probabilities.unsqueeze(-1), labels.unsqueeze(-1)],
        dim=-1,
    )
    empty = rows.new_tensor([0, 0, 0, 0, EMPTY_ROW_SCORE, 0])
    detections = empty.repeat(batch_size, top_k, 1)
    # a class that its query does not count for ranks at minus infinity
    detections[:, :kept] = torch.where((best == -torch.inf).unsqueeze(-1), empty, rows)
    return detections


def _check_shapes(logits: Tensor, boxes: Tensor, original_sizes: Tensor, top_k: int) -> None:
    batch_size, query_count, _ = logits.shape
    if boxes.shape != (batch_size, query_count, 4):
        raise ValueError(
            f"boxes have shape {tuple(boxes.shape)}, logits {tuple(logits.shape)}: pass boxes of shape "
            f"({batch_size}, {query_count}, 4), one per query of the same images."
        )
    if original_sizes.shape != (batch_size, 2):
        raise ValueError(
            f"original_sizes have shape {tuple(original_sizes.shape)} for {batch_size} images: pass "
            f"({batch_size}, 2), the (height, width) of each original image in pixels."
        )
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: pass the number of detections to keep per image, at least 1.")


def to_coco_detections(
    detections: np.ndarray | Tensor, image_ids: Sequence[int] | np.ndarray | Tensor, category_ids: Sequence[int]
) -> list[dict]:
    """Writes detections in COCO's result format.

    Args:
        detections: (n, top_k, 6) rows of `select_detections`: x, y, width, height in pixels, score, label. Rows with
            score -1 are left out.
        image_ids: n COCO image ids, each at most once.
        category_ids: the COCO category id of each label: `category_ids[label]`.

    Returns:
        One `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}` per detection, plain Python numbers.

    Raises:
        ValueError: a score or box that is not finite, a label without a category id, an image id that occurs twice, or
            another number of ids than of images.
    """
    detections = torch.as_tensor(detections).detach().cpu().double().numpy()
    image_ids = [int(image_id) for image_id in image_ids]
    if detections.ndim != 3 or detections.shape[2] != 6 or len(detections) != len(image_ids):
        raise ValueError(
            f"detections have shape {detections.shape} for {len(image_ids)} image ids: pass (n, top_k, 6) and n ids."
        )
    unique_ids, occurrences = np.unique(image_ids, return_counts=True)
    if (occurrences > 1).any():
        raise ValueError(
            f"image id {unique_ids[occurrences > 1][0]} occurs more than once: its detections would count as false "
            "positives. Drop the images that a distributed sampler repeats to fill its last batch."
        )

    results: list[dict] = []
    for image_id, rows in zip(image_ids, detections, strict=True):
        if not np.isfinite(rows).all():
            raise ValueError(
                f"image id {image_id}: a detection has a score or box that is not finite. The model's outputs have "
                "diverged: look for NaN in the losses or weights, lower the learning rate or clip the gradient."
            )
        rows = rows[rows[:, 4] != EMPTY_ROW_SCORE]
        labels = rows[:, 5].astype(np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < len(category_ids):
            raise ValueError(
                f"image id {image_id}: labels range from {labels.min()} to {labels.max()}, but there are "
                f"{len(category_ids)} category ids. Pass one category id per class of the model, in label order."
            )
        results.extend(
            {"image_id": image_id, "category_id": int(category_ids[label]), "bbox": row[:4], "score": row[4]}
            for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
        )
    return results
