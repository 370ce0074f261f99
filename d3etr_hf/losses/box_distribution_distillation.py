"""Box distribution distillation: where the teacher sees each edge of a box, not only its mean.

After D-FINE (Peng et al., ICLR 2025), whose last layer teaches its earlier ones so; there both count in the same bins
from the same reference box. Here each edge's distribution is first carried to where the student counts.
"""

import torch

from d3etr_hf.matching import MatchedPairs, TaughtGroup
from d3etr_hf.outputs import GroupOutput, wide

TEMPERATURE = 5.0
# a reference box's least side, as a share of the image's
LEAST_SIDE = 1e-6
# by which a place may miss the last bin and be taken for it, as a share of the range
ROUNDING = 1e-4


def box_distribution_distillation(
    teacher: TaughtGroup,
    student: GroupOutput,
    pairs: MatchedPairs,
    pair_weight: torch.Tensor,
    total_weight: torch.Tensor,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """KL(teacher || student) of matched queries' distributions over the distances of each edge, at a temperature.

    The teacher's distribution is softened after it has been carried over, so that softening adds no mass at the ends
    of the student's range; where both count alike this is D-FINE's own softening of logits. An edge counts with the
    mass that lies within that range: what lies beyond has no bin, and is left to the distillation of predictions.

    Args:
        teacher, student: box distributions with their references and bins, as `GroupOutput` has them.
        pairs: the matching, `(L, B, P)`.
        pair_weight: of each pair, `(L, B, P)`: a query of background has no edges to teach.
        total_weight: `(L,)`, what each layer's weighted sum is divided by (the weights' sum over all processes,
            divided by their number).
        temperature: by which logits are divided; the loss is multiplied by its square.

    Returns:
        `(L,)`, the weighted mean over pairs, of the mean over four edges.

    Raises:
        ValueError: one of the two has no box distributions.
    """
    for role, group in (("teacher", teacher), ("student", student)):
        if group.box_distribution is None:
            raise ValueError(f"box distributions cannot be distilled: the {role}'s boxes come from none")
    theirs, reference = _matched(teacher, pairs.teacher)
    ours, onto_reference = _matched(student, pairs.student)
    carried, within = carried_over(theirs.softmax(-1), reference, teacher.box_bins, onto_reference, student.box_bins)
    target = carried ** (1 / temperature)
    target = target / target.sum(-1, keepdim=True)
    divergence = (torch.xlogy(target, target) - target * (ours / temperature).log_softmax(-1)).sum(-1)
    return temperature**2 * (pair_weight * (within * divergence).mean(-1)).sum(dim=(1, 2)) / total_weight


def _matched(group: TaughtGroup | GroupOutput, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distribution logits `(L, B, P, 4, bins)` and reference boxes `(L, B, P, 4)` of these queries `(L, B, P)`."""
    logits = wide(group.box_distribution).take_along_dim(index[..., None, None], dim=2)
    return logits, wide(group.box_reference).expand(len(index), -1, -1, -1).take_along_dim(index[..., None], dim=2)


@torch.no_grad()
def carried_over(
    probability: torch.Tensor,
    reference: torch.Tensor,
    bins: torch.Tensor,
    onto_reference: torch.Tensor,
    onto_bins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same distributions of where edges lie, counted in other bins from other reference boxes.

    Each bin's mass goes to the two bins around its place, so that it stays as much, and its mean where it is; what
    lies beyond the last bin goes there.

    Args:
        probability: `(..., 4, bins)` over the distances of left, top, right and bottom edge.
        reference, onto_reference: `(..., 4)`, cxcywh in 0..1.
        bins, onto_bins: `(bins,)` and `(other bins,)`, ascending distances outwards, as shares of the reference's
            width or height.

    Returns:
        The distributions `(..., 4, other bins)`, and the mass of each that lies between the first bin and the last,
        `(..., 4)`.
    """
    (edge, side), (onto_edge, onto_side) = _edges(reference), _edges(onto_reference)
    distance = (edge + bins * side - onto_edge) / onto_side.clamp(min=LEAST_SIDE)
    left = (torch.searchsorted(onto_bins, distance, right=True) - 1).clamp(0, len(onto_bins) - 2)
    low, high = onto_bins[left], onto_bins[left + 1]
    share = ((distance - low) / (high - low)).clamp(0, 1)
    carried = probability.new_zeros(*probability.shape[:-1], len(onto_bins))
    carried = carried.scatter_add(-1, left, probability * (1 - share)).scatter_add(-1, left + 1, probability * share)
    slack = ROUNDING * (onto_bins[-1] - onto_bins[0])
    within = (distance >= onto_bins[0] - slack) & (distance <= onto_bins[-1] + slack)
    return carried, (probability * within).sum(-1)


def _edges(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the edges of boxes lie, outwards, and the sides that they are of: `(..., 4, 1)` each."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    outwards = torch.cat([size / 2 - centre, size / 2 + centre], dim=-1)
    return outwards[..., None], torch.cat([size, size], dim=-1)[..., None]
