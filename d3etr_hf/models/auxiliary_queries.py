"""The extra query groups that a student's decoder is given while it trains."""

import math

import torch
from torch import nn


class AuxiliaryQueries(nn.Module):
    """A second set of object queries: a teacher's, fixed, or learned ones of its own (the teacherless control).

    It is attached to a student with `add_query_group` so that it is moved, wrapped and optimised with it, and is left
    out of everything the student saves.

    Args:
        position_embeddings: `(N, width of their model)` object queries.
        width: the student's hidden size. Where it differs from the queries' own a learned linear map carries them
            over, initialised with orthonormal rows or columns so that N(0, 1) queries stay N(0, 1).
        reference_points: `(N, 2)` centres, x and y in 0..1, handed over with the queries; None lets the student's own
            head turn the queries into points (the paper's literal reading).
        learned: whether gradients reach the queries. A teacher's queries are fixed (section 3 of the paper).
    """

    def __init__(
        self,
        position_embeddings: torch.Tensor,
        width: int,
        reference_points: torch.Tensor | None = None,
        learned: bool = False,
    ):
        super().__init__()
        queries = position_embeddings.detach().clone()
        self.position_embeddings = nn.Parameter(queries) if learned else nn.Buffer(queries)
        self.reference_points = None if reference_points is None else nn.Buffer(reference_points.detach().clone())
        own_width = queries.shape[1]
        self.projection = nn.Identity() if own_width == width else nn.Linear(own_width, width)
        if own_width != width:
            nn.init.orthogonal_(self.projection.weight, gain=math.sqrt(max(1.0, width / own_width)))
            nn.init.zeros_(self.projection.bias)

    def __len__(self) -> int:
        return self.position_embeddings.shape[0]

    def forward(self) -> torch.Tensor:
        """The queries in the student's width: `(N, width)`."""
        return self.projection(self.position_embeddings)
