"""Box geometry, one generalised IoU for costs and losses alike."""

import torch


def centre_to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """cxcywh to xyxy, `(..., 4)`, in whatever unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def _area(size: torch.Tensor) -> torch.Tensor:
    # not prod, whose gradient looks for zeros on the host
    return size[..., 0] * size[..., 1]


def generalised_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes `(..., 4)` cxcywh that broadcast against each other.

    Returns:
        `(...)` values in -1..1. A pair whose union or hull has no area gives a finite value, never NaN.
    """
    tiny = 1e-9
    first, second = centre_to_corners(first), centre_to_corners(second)
    first_size = (first[..., 2:] - first[..., :2]).clamp(min=0)
    second_size = (second[..., 2:] - second[..., :2]).clamp(min=0)
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersection = _area(overlap.clamp(min=0))
    union = _area(first_size) + _area(second_size) - intersection
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = _area(hull.clamp(min=0))
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
