"""What passes between models, matching and losses: queries, predictions, attention, ground truth."""

from d3etr_hf import optional_torchvision  # noqa: F401
from d3etr_hf.outputs.attention_maps import AttentionMap, SampledAttention
from d3etr_hf.outputs.groups import (
    AUXILIARY,
    MOST_AUXILIARY_GROUPS,
    OBJECT_QUERIES,
    ONE_TO_MANY,
    OWN,
    RANDOM_QUERIES,
    SHARED_GROUPS,
    TEACHER_QUERIES,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    Queries,
    Supervised,
    auxiliary_names,
)
from d3etr_hf.outputs.memory import ComparedLevel, DecodedInstances, MemoryLevel
from d3etr_hf.outputs.scores import Scores, SelectedScores, SigmoidScores, SoftmaxScores, wide
from d3etr_hf.outputs.targets import NO_OBJECT, Targets

__all__ = [
    "AUXILIARY",
    "MOST_AUXILIARY_GROUPS",
    "NO_OBJECT",
    "ONE_TO_MANY",
    "OWN",
    "OBJECT_QUERIES",
    "RANDOM_QUERIES",
    "SHARED_GROUPS",
    "TEACHER_QUERIES",
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
    "auxiliary_names",
    "wide",
]
