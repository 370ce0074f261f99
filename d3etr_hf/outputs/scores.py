"""How a detector's class logits are read: by sigmoid, or by softmax with a no-object class.

Matching, losses and evaluation ask one of these objects; what passes between a teacher and a student that differ in
this is the class probabilities of objects, never logits.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Scores(ABC):
    """How class logits are read."""

    @abstractmethod
    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., ·)` logits to `(..., C)` probabilities that a query is an object of a class, float32 or wider."""

    @abstractmethod
    def ranking(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., ·)` logits to `(..., C)`: numbers that order detections as the probabilities do, without saturation.

        A class that a query does not count for, in the family's own evaluation, is at minus infinity.
        """

    @abstractmethod
    def entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy against soft targets.

        Args:
            logits: `(..., ·)`.
            targets: `(..., C)` class probabilities of objects, 0..1.

        Returns:
            `(...)`, summed over classes.
        """

    @abstractmethod
    def pairwise_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`entropy` of all pairs: `(I, N_s, ·)` logits and `(I, N_t, C)` targets to `(I, N_t, N_s)`."""

    @abstractmethod
    def classes(self, logits: torch.Tensor) -> int:
        """C, the number of classes of objects that logits `(..., ·)` tell apart."""


class SigmoidScores(Scores):
    """Every class by itself, with a sigmoid; no class is background."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return wide(logits).sigmoid()

    def ranking(self, logits: torch.Tensor) -> torch.Tensor:
        return wide(logits)

    def entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(wide(logits), targets, reduction="none").sum(-1)

    def pairwise_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # sum_c BCE(p, x) = sum_c softplus(x) - p x: one matrix product for all pairs
        return nn.functional.softplus(logits).sum(-1)[:, None] - targets @ logits.mT

    def classes(self, logits: torch.Tensor) -> int:
        return logits.shape[-1]


class SoftmaxScores(Scores):
    """One softmax over all classes and, last, no object.

    Soft targets become a distribution: what they leave to one is no object's, and where they exceed one (a sigmoid
    teacher that sees several classes in a query) they are divided by their sum.
    """

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return wide(logits).softmax(-1)[..., :-1]

    def ranking(self, logits: torch.Tensor) -> torch.Tensor:
        ranking = wide(logits).log_softmax(-1)[..., :-1]
        best = ranking.argmax(-1, keepdim=True)  # each query is one detection, as DETR is evaluated
        return torch.full_like(ranking, -torch.inf).scatter(-1, best, ranking.gather(-1, best))

    def entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -(self._distribution(targets) * wide(logits).log_softmax(-1)).sum(-1)

    def pairwise_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -(self._distribution(targets) @ logits.log_softmax(-1).mT)

    def classes(self, logits: torch.Tensor) -> int:
        return logits.shape[-1] - 1

    @staticmethod
    def _distribution(targets: torch.Tensor) -> torch.Tensor:
        """`(..., C)` to `(..., C + 1)`, which sum to one."""
        total = targets.sum(-1, keepdim=True)
        return torch.cat([targets, 1 - total.clamp(max=1)], dim=-1) / total.clamp(min=1)


class SelectedScores(Scores):
    """Some classes of a detector, in another order; each scores what it scores among all of them.

    Args:
        scores: how the logits of all its classes are read.
        index: the detector's class for each of the selected ones.
    """

    def __init__(self, scores: Scores, index: list[int]):
        self.scores, self.index = scores, index

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return self.scores.probabilities(logits)[..., self.index]

    def ranking(self, logits: torch.Tensor) -> torch.Tensor:
        return self.scores.ranking(logits)[..., self.index]

    def entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.scores.entropy(logits, self._among_all(logits, targets))

    def pairwise_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.scores.pairwise_entropy(logits, self._among_all(logits, targets))

    def classes(self, logits: torch.Tensor) -> int:
        return len(self.index)

    def _among_all(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`(..., C)` targets, with zeros for the classes that were not selected."""
        spread = targets.new_zeros(*targets.shape[:-1], self.scores.classes(logits))
        spread[..., self.index] = targets
        return spread
