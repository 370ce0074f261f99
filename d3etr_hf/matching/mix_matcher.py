"""MixMatcher (section 3 of D3ETR): which student query learns from which teacher query."""

from dataclasses import dataclass

import torch

from d3etr_hf.matching.matching_cost import prediction_cost
from d3etr_hf.matching.solver import Problem, Solution, solve
from d3etr_hf.outputs import GroupOutput, Scores


@dataclass(frozen=True)
class MatchedPairs:
    """Pairs of queries per decoder layer and image; the same number P of pairs everywhere.

    Attributes:
        teacher, student: int64 `(L, B, P)`; pair p joins query `teacher[k, b, p]` with query `student[k, b, p]`.
            Student indices ascend along P, so with P = N_s they are 0, 1, ..., N_s - 1.
        identity: whether pair p joins query p with query p everywhere, so that nothing need be gathered.
        counted: bool `(L, B, P)`, which pairs anything is learned of; None: all.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    identity: bool = False
    counted: torch.Tensor | None = None


@dataclass(frozen=True)
class TaughtGroup:
    """A teacher's outputs in the student's classes and layers.

    Attributes:
        probabilities: `(L, B, N_t, C)` class probabilities of objects, 0..1, float32 or wider.
        boxes: `(L, B, N_t, 4)`, cxcywh in 0..1.
        self_attention, cross_attention: as in `GroupOutput`.
        box_distribution, box_reference, box_bins: likewise.
    """

    probabilities: torch.Tensor
    boxes: torch.Tensor
    self_attention: tuple | None = None
    cross_attention: tuple | None = None
    box_distribution: torch.Tensor | None = None
    box_reference: torch.Tensor | None = None
    box_bins: torch.Tensor | None = None


def fixed_pairs(teacher: TaughtGroup, student: GroupOutput) -> MatchedPairs:
    """Query i with query i, in every layer: the teacher and the auxiliary group that holds its queries.

    Raises:
        ValueError: the numbers of layers, images or queries differ.
    """
    ours, theirs = student.boxes.shape[:3], teacher.boxes.shape[:3]
    if ours != theirs:
        raise ValueError(
            "fixed matching joins query i with query i, but the teacher has (layers, images, queries) "
            f"{tuple(theirs)} and the auxiliary group {tuple(ours)}"
        )
    index = torch.arange(ours[2], device=student.boxes.device).expand(ours)
    return MatchedPairs(index, index, identity=True)


@dataclass(frozen=True)
class AdaptiveMatcher:
    """Minimum-cost bipartite matching of the teacher's and the student's predictions, per image and per layer.

    With N_t <= N_s every teacher query is matched. With N_t > N_s the N_s teacher queries with the highest class score
    are chosen first, then matched: choosing by cost would drop the teacher's foreground.

    Attributes:
        scores: how the student's class logits are read.
        class_weight, l1_weight, giou_weight: weights of the three costs (1, 5, 2 by default).
        score_threshold: only teacher queries whose highest class score is above it are matched, as in Incremental-DETR
            (Dong et al., AAAI 2023), where the other predictions of the earlier model teach nothing; 0: all of them.
    """

    scores: Scores
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    score_threshold: float = 0.0

    def __call__(self, teacher: TaughtGroup, student: GroupOutput) -> MatchedPairs:
        """Match outputs with the same layers, images and classes; no gradient flows.

        Raises:
            NonFiniteCostError: a prediction is NaN or infinite.
        """
        problem, chosen = self.problem(teacher, student)
        return self.pairs(solve(problem), chosen, teacher)

    @torch.no_grad()
    def problem(self, teacher: TaughtGroup, student: GroupOutput) -> tuple[Problem, torch.Tensor | None]:
        """What is to be solved, and the teacher's queries `(L, B, N_s)` that were chosen, None for all of them."""
        probabilities, boxes, chosen = teacher.probabilities, teacher.boxes, None
        queries = student.boxes.shape[2]
        if boxes.shape[2] > queries:
            chosen = probabilities.amax(-1).topk(queries, dim=-1).indices
            probabilities = probabilities.take_along_dim(chosen[..., None], dim=2)
            boxes = boxes.take_along_dim(chosen[..., None], dim=2)
        weights = self.class_weight, self.l1_weight, self.giou_weight
        cost = prediction_cost(probabilities, boxes, student.logits, student.boxes, self.scores, weights)
        if self.score_threshold > 0:
            # all of them are matched all the same, but what costs nothing anywhere is in no other's way
            confident = probabilities.amax(-1, keepdim=True) > self.score_threshold
            cost = torch.where(confident, cost, 0)
        # student queries as rows: the solver returns rows in ascending order
        return Problem(cost.mT, "teacher to student"), chosen

    def pairs(self, solution: Solution, chosen: torch.Tensor | None, teacher: TaughtGroup) -> MatchedPairs:
        """The pairs of a solved `problem` of this teacher."""
        columns = solution.columns if chosen is None else chosen.gather(-1, solution.columns)
        if self.score_threshold == 0:
            return MatchedPairs(columns, solution.rows)
        confident = teacher.probabilities.amax(-1) > self.score_threshold
        return MatchedPairs(columns, solution.rows, counted=confident.gather(-1, columns))


@torch.no_grad()
def matched_foreground_share(probabilities: torch.Tensor, pairs: MatchedPairs, threshold: float = 0.3) -> torch.Tensor:
    """Share of the teacher's foreground queries that have a partner, over layers and images; 1 where there are none.

    Args:
        probabilities: the teacher's, `(L, B, N_t, C)`.
        threshold: the class score from which a query counts as foreground.

    Returns:
        A scalar in 0..1.
    """
    foreground = probabilities.amax(-1) >= threshold
    has_partner = foreground.take_along_dim(pairs.teacher, dim=-1)
    matched = (has_partner if pairs.counted is None else has_partner & pairs.counted).sum()
    return torch.where(foreground.any(), matched / foreground.sum().clamp(min=1), 1.0)
