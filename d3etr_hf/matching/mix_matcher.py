"""MixMatcher (section 3 of D3ETR): which student query learns from which teacher query."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from d3etr_hf.matching.solver import prediction_cost, start_assigning
from d3etr_hf.models.outputs import QueryGroupOutput


@dataclass(frozen=True)
class MatchedPairs:
    """Pairs of queries per decoder layer and image; the same number P of pairs everywhere.

    Attributes:
        teacher, student: int64 `(L, B, P)`; pair p joins query `teacher[k, b, p]` with query `student[k, b, p]`.
            Student indices ascend along P, so with P = N_s they are 0, 1, ..., N_s - 1.
        identity: whether pair p joins query p with query p everywhere, so that nothing need be gathered.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    identity: bool = False


class FixedMatcher:
    """Query i with query i, in every layer: the teacher and the auxiliary group that holds its queries."""

    def __call__(self, teacher: QueryGroupOutput, student: QueryGroupOutput) -> MatchedPairs:
        """Args: outputs of one shape `(L, B, N, ...)`. Raises: ValueError if the numbers of queries differ."""
        if teacher.logits.shape[:3] != student.logits.shape[:3]:
            raise ValueError(
                f"fixed matching joins query i with query i, but the teacher has (layers, images, queries) "
                f"{tuple(teacher.logits.shape[:3])} and the auxiliary group {tuple(student.logits.shape[:3])}"
            )
        layers, images, queries = teacher.logits.shape[:3]
        index = torch.arange(queries, device=teacher.logits.device).expand(layers, images, queries)
        return MatchedPairs(index, index, identity=True)


@dataclass(frozen=True)
class AdaptiveMatcher:
    """Minimum-cost bipartite matching of the teacher's and the student's predictions, per image and per layer.

    With N_t <= N_s every teacher query is matched. With N_t > N_s the N_s teacher queries with the highest class score
    are chosen first, then matched: choosing by cost would drop the teacher's foreground.

    Attributes:
        class_weight, l1_weight, giou_weight: weights of the three costs (1, 5, 2 by default).
    """

    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0

    def __call__(self, teacher: QueryGroupOutput, student: QueryGroupOutput) -> MatchedPairs:
        """Match outputs with the same layers, images and classes; no gradient flows.

        Raises:
            NonFiniteCostError: a prediction is NaN or infinite.
        """
        return self.start(teacher, student)()

    @torch.no_grad()
    def start(self, teacher: QueryGroupOutput, student: QueryGroupOutput) -> Callable[[], MatchedPairs]:
        """The same begun in threads; the function that is returned waits for the pairs. Errors are raised here."""
        teacher_logits, teacher_boxes = teacher.logits, teacher.boxes
        teacher_queries, student_queries = teacher_logits.shape[2], student.logits.shape[2]
        chosen = None
        if teacher_queries > student_queries:
            chosen = teacher_logits.amax(-1).topk(student_queries, dim=-1).indices
            teacher_logits = teacher_logits.take_along_dim(chosen[..., None], dim=2)
            teacher_boxes = teacher_boxes.take_along_dim(chosen[..., None], dim=2)
        cost = prediction_cost(
            teacher_logits,
            teacher_boxes,
            student.logits,
            student.boxes,
            self.class_weight,
            self.l1_weight,
            self.giou_weight,
        )
        # student queries as rows: scipy returns rows in ascending order
        assignments = start_assigning(cost.mT, "teacher to student")

        def wait() -> MatchedPairs:
            pairs = torch.from_numpy(np.array(assignments())).to(cost.device)  # (L, B, 2, P)
            rows, columns = pairs.unbind(2)
            return MatchedPairs(columns if chosen is None else chosen.gather(-1, columns), rows)

        return wait


@dataclass(frozen=True)
class MixMatcher:
    """Both matchings at once: adaptive for the student's own group, fixed for the auxiliary group; None is off."""

    adaptive: AdaptiveMatcher | None = AdaptiveMatcher()
    fixed: FixedMatcher | None = FixedMatcher()

    def __call__(
        self, teacher: QueryGroupOutput, student: QueryGroupOutput, auxiliary: QueryGroupOutput | None
    ) -> dict[str, MatchedPairs]:
        """Pairs by the group's name, "student" and "auxiliary", for the groups that are matched."""
        return {name: matched() for name, matched in self.start(teacher, student, auxiliary).items()}

    def start(
        self, teacher: QueryGroupOutput, student: QueryGroupOutput, auxiliary: QueryGroupOutput | None
    ) -> dict[str, Callable[[], MatchedPairs]]:
        """The same as functions that wait for the pairs: the fixed ones, which are there, before the adaptive ones."""
        student_pairs = None if self.adaptive is None else self.adaptive.start(teacher, student)
        pairs = {}
        if self.fixed is not None and auxiliary is not None:
            pairs["auxiliary"] = partial(self.fixed, teacher, auxiliary)
        if student_pairs is not None:
            pairs["student"] = student_pairs
        return pairs


@torch.no_grad()
def matched_foreground_share(
    teacher_logits: torch.Tensor, pairs: MatchedPairs, threshold: float = 0.3
) -> torch.Tensor:
    """Share of the teacher's foreground queries that have a partner, over layers and images; 1 where there are none.

    Args:
        teacher_logits: `(L, B, N_t, C)`.
        threshold: the class score from which a query counts as foreground.

    Returns:
        A scalar in 0..1.
    """
    foreground = teacher_logits.amax(-1).sigmoid() >= threshold
    matched = foreground.take_along_dim(pairs.teacher, dim=-1).sum()
    return torch.where(foreground.any(), matched / foreground.sum().clamp(min=1), 1.0)
