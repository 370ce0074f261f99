"""What passes between models, matching and losses: queries, predictions, attention, ground truth."""

from d3etr_hf import optional_torchvision  # noqa: F401
from d3etr_hf.outputs.attention_maps import AttentionMap, SampledAttention
from d3etr_hf.outputs.groups import (
    AUXILIARY,
    OWN,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    Queries,
    Supervised,
)
from d3etr_hf.outputs.memory import ComparedLevel, DecodedInstances, MemoryLevel
from d3etr_hf.outputs.scores import Scores, SelectedScores, SigmoidScores, SoftmaxScores, wide
from d3etr_hf.outputs.targets import NO_OBJECT, Targets

__all__ = [
    "AUXILIARY",
    "NO_OBJECT",
    "OWN",
    "AttentionMap",
    "ComparedLevel",
    "DecodedInstances",
    "DetectorOutput",
    "GroupOutput",
    "GroupRequest",
    "MemoryLevel",
    "Queries",
    "SampledAttention",
    "Scores",
    "SelectedScores",
    "SigmoidScores",
    "SoftmaxScores",
    "Supervised",
    "Targets",
    "wide",
]
