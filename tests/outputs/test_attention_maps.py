"""Sampled attention on a grid against a slow bilinear loop."""

import math

import pytest
import torch

from d3etr_hf.outputs import SampledAttention
from d3etr_hf.outputs.attention_maps import normalised_map, valid_sizes

BATCH, HEADS, QUERIES, PLACES, HEIGHT, WIDTH = 3, 2, 4, 5, 6, 7


def padded_mask() -> torch.Tensor:
    mask = torch.ones(BATCH, HEIGHT, WIDTH, dtype=torch.bool)
    mask[1, -2:] = False
    mask[2, :, -3:] = False
    mask[2, -1:] = False
    return mask


def sampled(spread: float, seed: int = 0, dtype=torch.float64) -> SampledAttention:
    """Places around the middle of the image; with a spread beyond a half some lie outside."""
    generator = torch.Generator().manual_seed(seed)
    shape = BATCH, HEADS, QUERIES, PLACES
    places = 0.5 + spread * (2 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 1)
    weights = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return SampledAttention(places.to(dtype), (weights / weights.sum(-1, keepdim=True)).to(dtype))


def slow_grid(places, weights, rows: int, columns: int) -> list[float]:
    """One query's map over HEIGHT x WIDTH, cell by cell: the tent around each place, and a little everywhere."""
    evenly = 0.01 / (rows * columns)
    grid = [[evenly * (row < rows and column < columns) for column in range(WIDTH)] for row in range(HEIGHT)]
    for (x, y), weight in zip(places, weights, strict=True):
        for row in range(rows):
            for column in range(columns):
                down = max(0.0, 1 - abs(y * rows - (row + 0.5)))
                right = max(0.0, 1 - abs(x * columns - (column + 0.5)))
                grid[row][column] += weight * down * right
    total = sum(map(sum, grid))
    return [value / total for line in grid for value in line]


# within the image's half cell at the edge, up to its edge, and outside
@pytest.mark.parametrize("spread", [0.3, 0.5, 0.8])
def test_on_grid_equals_slow_bilinear_loop(spread):
    mask, attention = padded_mask(), sampled(spread)
    outside = ((attention.places < 0) | (attention.places > 1)).any()
    assert outside == (spread > 0.5)
    found = attention.on_grid(mask)
    assert found.probability.shape == (BATCH, HEADS, QUERIES, HEIGHT * WIDTH)
    rows, columns = (size.tolist() for size in valid_sizes(mask))
    assert (rows, columns) == ([6, 4, 5], [7, 7, 4])
    for b in range(BATCH):
        for m in range(HEADS):
            for n in range(QUERIES):
                slow = slow_grid(
                    attention.places[b, m, n].tolist(), attention.weights[b, m, n].tolist(), rows[b], columns[b]
                )
                assert found.probability[b, m, n].tolist() == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_distributions_with_a_finite_logarithm(dtype):
    mask = padded_mask()
    attention = sampled(0.8, dtype=dtype).on_grid(mask)
    padding = (~mask).flatten(1)[:, None, None]
    assert attention.log.dtype == attention.probability.dtype == dtype
    total = attention.probability.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
    assert attention.probability.masked_select(padding).max() == 0 and attention.log.isfinite().all()
    assert attention.probability.masked_select(~padding).min() > 0  # KL(teacher || student) must stay finite
    torch.testing.assert_close(attention.log.exp(), attention.probability, atol=1e-6, rtol=0)
    assert attention.log.masked_select(padding).max() <= -1e30


def test_a_query_that_looks_at_nothing_of_the_image_looks_everywhere():
    mask = padded_mask()
    attention = sampled(0.3)
    lost = SampledAttention(attention.places + 5, attention.weights).on_grid(mask)
    for image, grid in enumerate(mask.flatten(1)):
        expected = grid.double() / grid.sum()
        torch.testing.assert_close(lost.probability[image, 0, 0], expected)


def test_a_place_at_a_cells_centre_is_that_cell_but_for_a_hundredth():
    mask = padded_mask()
    places = torch.empty(BATCH, 1, 1, 1, 2, dtype=torch.float64)
    for image, (rows, columns) in enumerate(zip(*valid_sizes(mask), strict=True)):
        places[image, 0, 0, 0] = torch.tensor([2.5 / columns, 1.5 / rows])
    found = SampledAttention(places, torch.ones(BATCH, 1, 1, 1, dtype=torch.float64)).on_grid(mask).probability
    assert found.flatten(1).argmax(-1).tolist() == [1 * WIDTH + 2] * BATCH
    cells = mask.flatten(1).sum(1).double()
    torch.testing.assert_close(found.amax(-1).flatten(), (1 + 0.01 / cells) / 1.01)


def test_divergence_of_a_dense_map_is_bounded_and_so_is_its_gradient():
    """Of an even map from one place: with the smallest number instead of a hundredth it would be about 87."""
    mask = padded_mask()
    places = torch.full((BATCH, 1, 1, 1, 2), 0.43, dtype=torch.float64, requires_grad=True)
    student = SampledAttention(places, torch.ones(BATCH, 1, 1, 1, dtype=torch.float64)).on_grid(mask)
    teacher = mask.flatten(1).double()[:, None, None]
    teacher = teacher / teacher.sum(-1, keepdim=True)
    divergence = torch.where(teacher > 0, teacher * (teacher.clamp(min=1e-9).log() - student.log), 0).sum(-1)
    assert 2 < divergence.min() and divergence.max() < 6
    divergence.sum().backward()
    assert 0 < places.grad.abs().max() < 100


def test_gradient_reaches_places_and_weights_and_equals_differences():
    mask, attention = padded_mask()[1:2], sampled(0.35)
    places = attention.places[1:2, :1, :2].clone().requires_grad_()
    weights = attention.weights[1:2, :1, :2].clone().requires_grad_()
    looked = mask.flatten(1)[:, None, None]

    def value(places, weights):
        found = SampledAttention(places, weights).on_grid(mask).probability
        return (found * torch.linspace(0, 1, HEIGHT * WIDTH, dtype=torch.float64) * looked).square().sum()

    assert torch.autograd.gradcheck(value, (places, weights), atol=1e-6)


def test_detach_leaves_the_values():
    attention = SampledAttention(*(part.requires_grad_() for part in sampled(0.3)))
    still = attention.detach()
    assert not still.places.requires_grad and torch.equal(still.weights, attention.weights)
    both = attention.on_grid(padded_mask())
    assert both.log.requires_grad and not both.detach().log.requires_grad


def test_normalised_map_of_no_mass():
    mask = padded_mask()
    nothing = normalised_map(torch.zeros(BATCH, 1, 1, HEIGHT * WIDTH), mask)
    assert math.isclose(float(nothing.probability[1, 0, 0].sum()), 1.0, rel_tol=1e-6)
    assert nothing.log.isfinite().all()
