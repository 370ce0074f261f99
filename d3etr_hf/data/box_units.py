"""Boxes in other units than pixels, or of other numbers than x, y, width, height, as far as the numbers show it."""

import numpy as np

from d3etr_hf.errors import DatasetError

# a box of fractions lies within the first pixel; annotation tools round, and write a little more than 1
LARGEST_FRACTION = 1.01
SMALLEST_IMAGE = 4  # pixels a side, below which a box of a pixel may be meant
TOLERANCE = 1.0  # pixels by which a box may leave its image by rounding
MOST = 0.5  # share of fractions above which the other boxes are not looked at
# Of boxes that all fit their images as corners, about three quarters leave them as x, y, width, height: those whose
# centre lies in the right or the lower half. Of boxes that are what they should be next to none do.
CERTAIN_SHARE, CERTAIN_COUNT = 0.5, 5
SUSPICIOUS_SHARE, SUSPICIOUS_COUNT = 0.1, 3
FITTING_SHARE = 0.98

MEANT = "`bbox` is x, y, width, height in pixels"
MEANINGS = {
    "corners": "corners (x1, y1, x2, y2)",
    "centres": "centres with width and height (cx, cy, width, height)",
}
REMEDIES = {
    "fractions": f"{MEANT}: multiply x and width by the image's width, y and height by its height",
    "corners": f"{MEANT}: write x1, y1, x2 - x1, y2 - y1 instead of x1, y1, x2, y2",
    "centres": f"{MEANT}, x and y of the upper left corner: subtract half the width and half the height",
}


def check_box_units(boxes: np.ndarray, sides: np.ndarray, ids: np.ndarray, source: str) -> str:
    """Refuses boxes that are certainly no x, y, width, height in pixels.

    Args:
        boxes: (n, 4) float64, as they are given.
        sides: (n, 2) float64, width and height of each box's image, pixels.
        ids: (n,) of the annotations.
        source: what a message calls the data.

    Returns:
        What is suspicious though not certain, as the sentence of a warning; empty if nothing is.

    Raises:
        DatasetError: all of them are fractions of their image, or corners.
    """
    known = np.isfinite(boxes).all(1) & (np.abs(boxes) < 1e9).all(1) & (boxes[:, 2:] > 0).all(1)
    boxes, sides, ids = boxes[known], sides[known], ids[known]
    fractions = (np.abs(boxes) <= LARGEST_FRACTION).all(1) & (sides > SMALLEST_IMAGE).all(1)
    # a box of whole numbers within the first pixel is a place holder rather than a fraction
    told = fractions & (boxes % 1 != 0).any(1)
    if not told.any():
        return _check_corners(boxes, sides, ids, source)
    found = f"{_share(told)} lie within the first pixel of their image and look like fractions of it (0..1)"
    note = _tell("fractions", found, _first(boxes, ids, told), source, certain=bool(fractions.all()))
    if told.mean() > MOST:
        return note
    others = ~fractions  # which those few say nothing of
    return " ".join(filter(None, (note, _check_corners(boxes[others], sides[others], ids[others], source))))


def _check_corners(boxes: np.ndarray, sides: np.ndarray, ids: np.ndarray, source: str) -> str:
    """As `check_box_units`, of corners and centres."""
    leaving = (boxes[:, :2] + boxes[:, 2:] > sides + TOLERANCE).any(1)
    count, share = int(leaving.sum()), leaving.mean() if len(leaving) else 0.0
    if count < SUSPICIOUS_COUNT or share < SUSPICIOUS_SHARE:
        return ""
    for kind, fit in (("corners", _fit_as_corners(boxes, sides)), ("centres", _fit_as_centres(boxes, sides))):
        if fit.mean() >= FITTING_SHARE:
            found = (
                f"{_share(fit)} look like {MEANINGS[kind]}: they fit their images as such, and {count} leave them now"
            )
            certain = kind == "corners" and fit.all() and count >= CERTAIN_COUNT and share >= CERTAIN_SHARE
            return _tell(kind, found, _first(boxes, ids, leaving), source, certain)
    return ""


def _fit_as_corners(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    within = (boxes[:, :2] >= -TOLERANCE).all(1) & (boxes[:, 2:] <= sides + TOLERANCE).all(1)
    return within & (boxes[:, 2:] > boxes[:, :2]).all(1)


def _fit_as_centres(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    halves = boxes[:, 2:] / 2
    starts, ends = boxes[:, :2] - halves, boxes[:, :2] + halves
    return (starts >= -TOLERANCE).all(1) & (ends <= sides + TOLERANCE).all(1)


def _share(chosen: np.ndarray) -> str:
    return f"all {len(chosen)} boxes" if chosen.all() else f"{chosen.sum()} of {len(chosen)} boxes"


def _first(boxes: np.ndarray, ids: np.ndarray, chosen: np.ndarray) -> str:
    index = int(chosen.argmax())
    numbers = ", ".join(f"{number:.6g}" for number in boxes[index])
    return f"the first is [{numbers}] of annotation {ids[index]}"


def _tell(kind: str, found: str, first: str, source: str, certain: bool) -> str:
    message = f"{source}: {found}; {first}; {REMEDIES[kind]}"
    if certain:
        raise DatasetError(f"{message}.")
    return f"{message}, if that is so."
