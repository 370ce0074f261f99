"""A teacher's memory on a student's grid against fine sampling."""

import pytest
import torch

from d3etr_hf.losses.grids import compared_levels, nearest_level, resample_features
from d3etr_hf.outputs import MemoryLevel
from tests.slow_memories import resampled_features


def mask_of(height: int, width: int, *images: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(len(images), height, width, dtype=torch.bool)
    for image, (rows, columns) in zip(mask, images, strict=True):
        image[:rows, :columns] = True
    return mask


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (((4, 6), (4, 6), (3, 5)), ((4, 6), (4, 6), (3, 5))),
        (((8, 12), (8, 12), (6, 10)), ((4, 6), (4, 6), (3, 5))),
        (((3, 4), (2, 4), (3, 3)), ((4, 6), (3, 6), (4, 5))),
    ],
    ids=["same", "finer", "coarser"],
)
def test_features_are_resampled_by_area(source, target):
    """Image by image on what is no padding; padding has zeros."""
    source_mask, target_mask = mask_of(*source[0], *source[1:]), mask_of(*target[0], *target[1:])
    features = torch.randn(2, 3, *source[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = resample_features(features, source_mask, target_mask)
    assert found.shape == (2, 3, *target[0])
    for image in range(2):
        (rows, columns), expected = target[1 + image], torch.zeros(3, *target[0], dtype=torch.float64)
        expected[:, :rows, :columns] = resampled_features(features[image], source[1 + image], target[1 + image])
        torch.testing.assert_close(found[image], expected, rtol=1e-6, atol=1e-6)


def test_levels_are_paired_by_nearest_size():
    assert [nearest_level(cells, [6400, 1600, 400]) for cells in (9000, 1600, 3300, 900, 100)] == [0, 1, 0, 1, 2]
    assert nearest_level(800, [1600, 400]) == 0, "of two as near the first"


def test_compared_levels():
    """Each of the student's has a partner on its own grid; nothing leads back to the teacher."""
    student = [
        MemoryLevel(torch.randn(1, 2, *size), torch.ones(1, *size, dtype=torch.bool)) for size in ((4, 4), (2, 2))
    ]
    theirs = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4).requires_grad_()
    fine, coarse = compared_levels(student, [MemoryLevel(theirs, student[0].mask)])
    assert torch.equal(fine.student, student[0].features) and torch.equal(coarse.student, student[1].features)
    torch.testing.assert_close(fine.teacher, theirs.detach())
    torch.testing.assert_close(coarse.teacher[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert not fine.teacher.requires_grad and fine.teacher.shape == (1, 3, 4, 4)
    half = [MemoryLevel(part.bfloat16(), mask) for part, mask in student]
    assert compared_levels(half, half)[0].student.dtype == torch.float32
