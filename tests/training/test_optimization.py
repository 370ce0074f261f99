"""The paper's schedule."""

import torch

from d3etr_hf.training.optimization import single_drop


def test_the_drop_is_at_the_nearest_step():
    """0.29 x 100 is a hair below 29 in floating point."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (factor,) = single_drop(optimizer, 100, 0, 0.29).lr_lambdas
    assert [factor(step) for step in (0, 28, 29, 99)] == [1.0, 1.0, 0.1, 0.1]
