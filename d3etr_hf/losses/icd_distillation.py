"""ICD (Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021), on memories.

Two parts, which share no gradient. Distillation: of each object and head the squared difference of the two memories'
values, normed, weighted by where the decoder looks for that object in the teacher's memory, a mean over channels,
heads and objects. The auxiliary task, by which the decoder learns where to look, of the teacher's memory alone: is
there such an object (binary cross-entropy, a mean over objects and fakes), and where are its edges (L1 as a share of
its width or height, the sum of four, a mean over objects). All are means, between which the weights are 1 here (the
authors weigh the distillation more); a weight of 1 is sensible.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from d3etr_hf.outputs import DecodedInstances

# a box's least side, as a share of the image's
LEAST_SIDE = 1e-6


def icd_distillation(decoded: DecodedInstances, fakes: int, objects: float | torch.Tensor) -> torch.Tensor:
    """Distillation plus auxiliary task; images without an object add nothing.

    Args:
        decoded: what the conditional decoder found.
        fakes: how many there are for each object.
        objects: number of objects that means go over (of all processes, divided by their number).

    Returns:
        `(1,)`.
    """
    of_objects = (decoded.attention * decoded.real[:, None, :, None]).sum(2)
    squares = (decoded.teacher_values - decoded.student_values).square().mean(-1)
    distillation = (of_objects * squares).sum() / decoded.attention.shape[1]
    truth = decoded.real.to(decoded.confidence.dtype)
    entropy = binary_cross_entropy_with_logits(decoded.confidence, truth, reduction="none")
    identification = (entropy * decoded.there).sum() / (1 + fakes)
    target = decoded.target_edges.to(decoded.edges.dtype)
    sides = (target + target.roll(2, dims=-1)).clamp(min=LEAST_SIDE)
    localisation = ((decoded.edges - target).abs() / sides * decoded.real[..., None]).sum()
    return ((distillation + identification + localisation) / objects)[None]
