"""Box geometry, one generalised IoU for costs and losses alike."""

import torch


def centre_to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """cxcywh to xyxy, `(..., 4)`, in whatever unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """IoU of boxes `(..., 4)` cxcywh, pair by pair: `(...)` in 0..1, and 0 where neither has an area."""
    corners, others = centre_to_corners(first), centre_to_corners(second)
    sides = torch.minimum(corners[..., 2:], others[..., 2:]) - torch.maximum(corners[..., :2], others[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    return shared / (first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared).clamp(min=1e-9)


def generalised_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes `(..., 4)` cxcywh that broadcast against each other.

    Works coordinate by coordinate, over contiguous memory, and in place on what it has just made: for all pairs of
    many queries the time goes into memory, not into arithmetic.

    Returns:
        `(...)` values in -1..1. A pair whose union or hull has no area gives a finite value, never NaN.
    """
    tiny = 1e-9
    left, top, right, bottom = centre_to_corners(first).unbind(-1)
    other_left, other_top, other_right, other_bottom = centre_to_corners(second).unbind(-1)
    area = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    other_area = (other_right - other_left).clamp(min=0) * (other_bottom - other_top).clamp(min=0)
    width = torch.minimum(right, other_right).sub_(torch.maximum(left, other_left)).clamp_(min=0)
    height = torch.minimum(bottom, other_bottom).sub_(torch.maximum(top, other_top)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (area + other_area).sub_(intersection)
    width = torch.maximum(right, other_right).sub_(torch.minimum(left, other_left)).clamp_(min=0)
    height = torch.maximum(bottom, other_bottom).sub_(torch.minimum(top, other_top)).clamp_(min=0)
    hull = width.mul_(height)
    outside = (hull - union).div_(hull.clamp(min=tiny))
    return intersection.div_(union.clamp(min=tiny)).sub_(outside)
