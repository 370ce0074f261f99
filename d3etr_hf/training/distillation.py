"""The options of the distillation as one small frozen object, which the objective takes.

Beside D3ETR's own they switch on baselines of the field, all of them off by default:

- Group DETR (Chen et al., "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment", ICCV 2023), without
  a teacher: L = 1/K sum over K groups of L_det(group), each with its own assignment. K is 1 + `auxiliary_groups` of
  learned queries, and `group_reduction` says whether the sum is divided.
- H-DETR's one-to-many branch (Jia et al., "DETRs with Hybrid Matching", CVPR 2023), without a teacher: L = L_det(own
  queries, objects) + weight L_det(further queries, every object K times), the second divided by K times the objects.
- DN-DETR's denoising, without a teacher, for families that have none of their own: see `denoising`.
- KD-DETR, and CLoCKDistill's queries of objects: see `shared_queries`.
- DETRDistill: logits by `losses.hungarian_logits_distillation`; its query-prior assignment is an auxiliary group of
  the teacher's queries with the teacher's assignment of each layer, without pairs of fixed matching.
- Incremental-DETR's confident pairs: see `matching.AdaptiveMatcher`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from d3etr_hf.models.memory_methods import MEMORY_METHODS
from d3etr_hf.outputs import AUXILIARY, OBJECT_QUERIES, OWN, RANDOM_QUERIES, TEACHER_QUERIES, auxiliary_names


@dataclass(frozen=True)
class Distillation:
    """What is learned from whom, and how it weighs; the fields are documented in `D3etrTrainingArguments`."""

    auxiliary_queries: str = "teacher"
    auxiliary_groups: int = 1
    denoising_groups: int = 0
    denoising_box_noise: float = 0.4
    denoising_label_noise: float = 0.2
    one_to_many_queries: int = 0
    one_to_many_repeats: int = 6
    one_to_many_weight: float = 1.0
    auxiliary_reference_points: str = "student"
    auxiliary_assignment: str = "teacher_last_layer"
    group_reduction: str = "sum"
    adaptive_matching: bool = True
    matching_score_threshold: float = 0.0
    fixed_matching: bool = True
    self_attention_weight: float = 1.0
    cross_attention_weight: float = 1.0
    prediction_weight: float = 1.0
    box_distribution_weight: float = 0.0
    fitnet_weight: float = 0.0
    fgd_weight: float = 0.0
    defeat_weight: float = 0.0
    detrdistill_memory_weight: float = 0.0
    clockdistill_memory_weight: float = 0.0
    icd_weight: float = 0.0
    vidt_weight: float = 0.0
    logits_distillation_weight: float = 0.0
    logits_negative_weight: float = 1.0
    logits_layer_weights: list[float] | None = None
    shared_query_weight: float = 0.0
    shared_random_queries: int = 300
    shared_teacher_queries: bool = True
    shared_object_queries: bool = False
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
            shared_query_weight=0.0,
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
            "one_to_many_weight",
            "logits_negative_weight",
        )
        return tuple(
            field.name for field in fields(self) if field.name.endswith("_weight") and field.name not in others
        )

    @property
    def match_weights(self) -> tuple[float, float, float]:
        """Weights of class, L1 and GIoU between a teacher's prediction and a student's."""
        return self.distillation_class_weight, self.distillation_l1_weight, self.distillation_giou_weight

    @property
    def auxiliary_names(self) -> tuple[str, ...]:
        """Names of the auxiliary groups, of which ground truth is asked as of the student's own."""
        return () if self.auxiliary_queries == "none" else auxiliary_names(self.auxiliary_groups)

    @property
    def has_terms(self) -> bool:
        """Whether any distillation term is on."""
        weights = self.self_attention_weight, self.cross_attention_weight, self.prediction_weight
        return max(*weights, self.box_distribution_weight, self.logits_distillation_weight) > 0

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
    def shared_groups(self) -> tuple[str, ...]:
        """Names of the groups whose queries the teacher decodes as well, to be followed query by query."""
        if self.shared_query_weight == 0:
            return ()
        own = AUXILIARY if self.auxiliary_queries == "teacher" else TEACHER_QUERIES
        drawn = (RANDOM_QUERIES,) * (self.shared_random_queries > 0)
        return drawn + (own,) * self.shared_teacher_queries + (OBJECT_QUERIES,) * self.shared_object_queries

    @property
    def teacher_groups(self) -> tuple[str, ...]:
        """Names of the groups whose queries come from the teacher, or are drawn as the teacher's."""
        auxiliary = (AUXILIARY,) * (self.auxiliary_queries == "teacher")
        return tuple(dict.fromkeys(auxiliary + self.shared_groups))

    @property
    def teacher_assigns(self) -> bool:
        """Whether the auxiliary group takes objects from the teacher's assignment of ground truth."""
        assigns = self.auxiliary_queries == "teacher" and self.auxiliary_assignment != "own"
        return assigns and self.detection_weight > 0

    @property
    def follows_teacher(self) -> bool:
        """Whether any term compares the student with a teacher."""
        return bool(self.distilled_groups or self.shared_groups or self.memory_methods)

    @property
    def reads_teacher_outputs(self) -> bool:
        """Whether a step runs the teacher: for distillation, or for its assignment of ground truth."""
        return self.follows_teacher or self.teacher_assigns

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
