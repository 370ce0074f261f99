"""Which cells objects cover, against a loop over cells."""

import pytest
import torch

from d3etr_hf.losses.memory_cells import covered_cells, mean_over
from d3etr_hf.outputs import Targets
from tests.tiny import random_labels, targets_of


def overlaps(box: list[float], row: int, column: int, rows: int, columns: int) -> bool:
    """Whether box and cell share an area."""
    x, y, width, height = box
    shared_x = min((column + 1) / columns, x + width / 2) - max(column / columns, x - width / 2)
    shared_y = min((row + 1) / rows, y + height / 2) - max(row / rows, y - height / 2)
    return shared_x > 0 and shared_y > 0


def test_a_box_covers_every_cell_that_it_overlaps():
    mask = torch.zeros(3, 7, 9, dtype=torch.bool)
    sizes = [(7, 9), (5, 9), (7, 4)]
    for image, (rows, columns) in zip(mask, sizes, strict=True):
        image[:rows, :columns] = True
    targets = targets_of(random_labels([4, 0, 3], seed=5))
    covered = covered_cells(targets, mask)
    assert covered.shape == (3, 4, 7, 9) and covered.any()
    for image, (rows, columns) in enumerate(sizes):
        for place in range(4):
            for row in range(7):
                for column in range(9):
                    within = place < targets.counts[image] and row < rows and column < columns
                    box = targets.boxes[image, place].tolist()
                    expected = within and overlaps(box, row, column, rows, columns)
                    assert bool(covered[image, place, row, column]) == expected


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([0.5, 0.5, 0.0, 0.0], [2, 3], [2, 3]),  # of no size, in the middle: rounding may take either side
        ([1.0, 1.0, 0.0, 0.0], [3, 3], [3, 3]),
        ([0.5, 0.25, 1.0, 0.5], [0, 1], [0, 3]),  # edges on edges of cells
        ([1.2, 0.1, 0.2, 0.1], [0, 0], [3, 3]),  # outside
    ],
)
def test_boxes_at_edges(box, rows, columns):
    """Every object covers a cell, and none that it only touches."""
    targets = Targets(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[box]]), [1])
    covered = covered_cells(targets, torch.ones(1, 4, 4, dtype=torch.bool))[0, 0]
    places = covered.nonzero()
    assert len(places)
    for found, allowed in zip((places[:, 0], places[:, 1]), (rows, columns), strict=True):
        assert allowed[0] <= found.min() and found.max() <= allowed[1]
    if box[2]:
        assert len(places) == (rows[1] - rows[0] + 1) * (columns[1] - columns[0] + 1)


def test_a_mean_over_no_cell_is_zero():
    values, cells = torch.ones(2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.bool)
    values[0, 0, 0], cells[0, 0] = 4.0, True
    assert mean_over(values, cells).tolist() == [2.5, 0.0]


def test_no_object_in_the_batch():
    targets = Targets(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, 4), [0])
    assert covered_cells(targets, torch.ones(1, 2, 2, dtype=torch.bool)).shape == (1, 0, 2, 2)
