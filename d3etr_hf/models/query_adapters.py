"""How further query groups reach a student's decoder while it trains: modules, and what is made of their anchors."""

import math

import torch
from torch import nn

from d3etr_hf.outputs import Queries

# sides of the box around a query that has none, as a share of the image
FRESH_SIDE = 0.2


class LearnedQueries(nn.Module):
    """Queries of the student's own for a further group (the teacherless control).

    Args:
        queries: the start values, one image's worth; those that are there are learned.
    """

    def __init__(self, queries: Queries):
        super().__init__()
        self.content = None if queries.content is None else nn.Parameter(queries.content.detach().clone())
        self.position = None if queries.position is None else nn.Parameter(queries.position.detach().clone())
        anchors = queries.anchors
        # learned before the sigmoid, so that they stay in 0..1
        self.anchor_logits = None if anchors is None else nn.Parameter(anchors.detach().logit(1e-5))

    def forward(self, queries: None) -> Queries:
        """The queries; nothing is handed over."""
        anchors = None if self.anchor_logits is None else self.anchor_logits.sigmoid()
        return Queries(self.content, self.position, anchors)


class NoisedLabels(nn.Module):
    """Content of queries that are made of ground truth (denoising): a learned embedding of each class.

    Args:
        classes: how many there are.
        width: hidden size of the student.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(classes, width)

    def forward(self, queries: Queries) -> Queries:
        """Of class numbers, int64 `(B, N, 1)` as content, embeddings `(B, N, d)`; anchors as they are."""
        return Queries(content=self.embedding(queries.content[..., 0]), anchors=queries.anchors)


class QueryAdapter(nn.Module):
    """Carries another model's queries into the student's width; anchors go over as they are.

    Where the widths are equal nothing is learned and nothing changes. Else a linear map carries content and position,
    initialised with orthonormal rows or columns so that N(0, 1) queries stay N(0, 1).

    Args:
        their_width, width: hidden size of the queries' own model and of the student.
    """

    def __init__(self, their_width: int, width: int):
        super().__init__()
        self.projection: nn.Module = nn.Identity() if their_width == width else nn.Linear(their_width, width)
        if isinstance(self.projection, nn.Linear):
            nn.init.orthogonal_(self.projection.weight, gain=math.sqrt(max(1.0, width / their_width)))
            nn.init.zeros_(self.projection.bias)

    def forward(self, queries: Queries) -> Queries:
        """The queries in the student's width."""

        def carried(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else self.projection(part)

        return Queries(carried(queries.content), carried(queries.position), queries.anchors)


def boxes_of(queries: Queries) -> torch.Tensor:
    """Any model's queries as boxes, cxcywh in 0..1: around points, and the whole image where there is neither."""
    anchors, content = queries.anchors, queries.position if queries.content is None else queries.content
    if anchors is None:
        return content.new_tensor([0.5, 0.5, 1, 1]).expand(*content.shape[:-1], 4)
    return anchors if anchors.shape[-1] == 4 else torch.cat([anchors, torch.full_like(anchors, FRESH_SIDE)], dim=-1)
