"""The options of the distillation as one small frozen object, which the objective takes."""

from dataclasses import dataclass, fields, replace
from typing import Any

from d3etr_hf.models.memory_methods import MEMORY_METHODS
from d3etr_hf.outputs import AUXILIARY, OWN


@dataclass(frozen=True)
class Distillation:
    """What is learned from whom, and how it weighs; the fields are documented in `D3etrTrainingArguments`."""

    auxiliary_queries: str = "teacher"
    auxiliary_reference_points: str = "student"
    auxiliary_assignment: str = "teacher_last_layer"
    group_reduction: str = "sum"
    adaptive_matching: bool = True
    fixed_matching: bool = True
    self_attention_weight: float = 1.0
    cross_attention_weight: float = 1.0
    prediction_weight: float = 1.0
    box_distribution_weight: float = 0.0
    fitnet_weight: float = 0.0
    fgd_weight: float = 0.0
    defeat_weight: float = 0.0
    detrdistill_memory_weight: float = 0.0
    icd_weight: float = 0.0
    vidt_weight: float = 0.0
    detection_weight: float = 1.0
    distillation_class_weight: float = 1.0
    distillation_l1_weight: float = 5.0
    distillation_giou_weight: float = 2.0
    attention_divergence: str = "kl"
    cross_attention_space: str = "auto"
    prediction_normaliser: str = "pairs"

    def of_predictions(self) -> "Distillation":
        """What is left of it under a teacher that has predictions only."""
        queries = "none" if self.auxiliary_queries == "teacher" else self.auxiliary_queries
        of_memory: dict[str, Any] = {f"{name}_weight": 0.0 for name in MEMORY_METHODS}
        return replace(
            self,
            auxiliary_queries=queries,
            self_attention_weight=0.0,
            cross_attention_weight=0.0,
            box_distribution_weight=0.0,
            **of_memory,
        )

    @property
    def term_weights(self) -> tuple[str, ...]:
        """Names of the weights of all terms that learn from a teacher."""
        others = (
            "detection_weight",
            "distillation_class_weight",
            "distillation_l1_weight",
            "distillation_giou_weight",
        )
        return tuple(
            field.name for field in fields(self) if field.name.endswith("_weight") and field.name not in others
        )

    @property
    def match_weights(self) -> tuple[float, float, float]:
        """Weights of class, L1 and GIoU between a teacher's prediction and a student's."""
        return self.distillation_class_weight, self.distillation_l1_weight, self.distillation_giou_weight

    @property
    def has_terms(self) -> bool:
        """Whether any distillation term is on."""
        weights = self.self_attention_weight, self.cross_attention_weight, self.prediction_weight
        return max(*weights, self.box_distribution_weight) > 0

    @property
    def distilled_groups(self) -> tuple[str, ...]:
        """Names of the groups that learn from the teacher, as far as terms are on at all."""
        if not self.has_terms:
            return ()
        fixed = self.fixed_matching and self.auxiliary_queries == "teacher"
        return (OWN,) * self.adaptive_matching + (AUXILIARY,) * fixed

    @property
    def memory_methods(self) -> tuple[str, ...]:
        """Names of the methods by which the student's encoder memory learns from the teacher's."""
        return tuple(name for name in MEMORY_METHODS if getattr(self, f"{name}_weight") > 0)

    @property
    def reads_hidden_states(self) -> bool:
        """Whether a step reads what the last decoder layer makes of queries."""
        return self.detrdistill_memory_weight > 0 or self.vidt_weight > 0

    @property
    def teacher_assigns(self) -> bool:
        """Whether the auxiliary group takes objects from the teacher's assignment of ground truth."""
        assigns = self.auxiliary_queries == "teacher" and self.auxiliary_assignment != "own"
        return assigns and self.detection_weight > 0

    @property
    def reads_teacher_outputs(self) -> bool:
        """Whether a step runs the teacher: for distillation, or for its assignment of ground truth."""
        return bool(self.distilled_groups or self.memory_methods) or self.teacher_assigns

    @property
    def needs_teacher(self) -> bool:
        """Whether this run reads a teacher at all: its queries or its outputs."""
        return self.auxiliary_queries == "teacher" or self.reads_teacher_outputs

    @property
    def reads_self_attention(self) -> bool:
        """Whether a step compares self-attention maps."""
        return self.self_attention_weight > 0 and bool(self.distilled_groups)

    @property
    def reads_cross_attention(self) -> bool:
        """Whether a step compares cross-attention maps."""
        return self.cross_attention_weight > 0 and bool(self.distilled_groups)
