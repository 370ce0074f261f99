"""The D3ETR objective: which loss is taken between which groups, with which pairs, weight and normaliser."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import ConditionalDetrConfig

from d3etr_hf.losses import (
    cross_attention_distillation,
    detection_losses,
    pair_weights,
    prediction_distillation,
    self_attention_distillation,
)
from d3etr_hf.matching import (
    AdaptiveMatcher,
    FixedMatcher,
    HungarianAssigner,
    MixMatcher,
    Targets,
    matched_foreground_share,
)
from d3etr_hf.models import DetectorOutput, QueryGroupOutput
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

GROUPS = ("student", "auxiliary")


@dataclass
class Shares:
    """What sums over this batch are divided by, so that processes and accumulated batches add up to one mean.

    Exact for every term but prediction distillation with the "boxes" normaliser, whose weights are known one batch at
    a time: there it is the mean over batches of each one's weighted mean (exact over processes).

    Attributes:
        boxes: ground-truth boxes of the whole step (all processes, all accumulated batches) / number of processes.
        images: images of the whole step / number of processes.
        average: the mean of a tensor over processes (the identity on one).
    """

    boxes: torch.Tensor
    images: torch.Tensor
    average: Callable[[torch.Tensor], torch.Tensor]


class D3etrObjective:
    """L = L_det(student) + L_det(auxiliary) + sum over layers and groups of the distillation terms (see README).

    Args:
        args: the options; which terms are on, their weights, the matcher's.
        config: the student's configuration, which holds the detection loss's weights and costs.
        class_index: int64 `(C,)`, the teacher's class for each of the student's.
        layer_map: the teacher's decoder layer for each of the student's.
    """

    def __init__(
        self,
        args: D3etrTrainingArguments,
        config: ConditionalDetrConfig,
        class_index: torch.Tensor | None = None,
        layer_map: list[int] | None = None,
    ):
        self.args, self.class_index, self.layer_map = args, class_index, layer_map
        # read on the host, once: most teachers' classes need no gathering
        self._classes_in_order = class_index is None or class_index.tolist() == list(range(len(class_index)))
        groups = args.distilled_groups()
        adaptive = AdaptiveMatcher(args.class_weight, args.l1_weight, args.giou_weight)
        self.matcher = MixMatcher(
            adaptive if "student" in groups else None, FixedMatcher() if "auxiliary" in groups else None
        )
        self.assigner = HungarianAssigner(config.class_cost, config.bbox_cost, config.giou_cost, config.focal_alpha)
        scale = args.detection_weight / (2 if self._averages_groups else 1)
        self.detection_weights = {
            "class": scale * config.cls_loss_coefficient,
            "l1": scale * config.bbox_loss_coefficient,
            "giou": scale * config.giou_loss_coefficient,
        }

    @property
    def _averages_groups(self) -> bool:
        return self.args.group_reduction == "mean" and self.args.auxiliary_queries != "none"

    def __call__(
        self, student: DetectorOutput, teacher: DetectorOutput | None, targets: Targets, shares: Shares
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Every weighted loss term of one batch, and what is worth knowing of the matching.

        Args:
            student: groups "student" and, if there is one, "auxiliary", in this order.
            teacher: its only group; None where the options need none.

        Returns:
            Terms named "group/term", `(L,)` each, whose sum is the loss; and statistics, scalars without gradient.

        Raises:
            NonFiniteCostError: a prediction is NaN or infinite.
        """
        groups = dict(zip(GROUPS[: len(student.groups)], student.groups, strict=True))
        teacher_group = None if teacher is None else self._aligned(teacher.groups[0], self.layer_map)
        terms, statistics, pending = {}, {}, {}
        if teacher is not None and self.args.distilled_groups():
            pending = self.matcher.start(teacher_group, groups["student"], groups.get("auxiliary"))
        # threads assign teacher to student queries while what needs no such pairs is computed
        if self.args.detection_weight > 0:
            terms |= self._detection_terms(groups, teacher_group, teacher, targets, shares)
        pairs = {}
        for name, matched in pending.items():
            pairs[name] = matched()
            memory_masks = teacher.memory_mask, student.memory_mask
            terms |= self._attention_terms(name, teacher_group, groups[name], pairs[name], memory_masks, shares)
        if pairs and self.args.prediction_weight > 0:
            terms |= self._prediction_terms(teacher_group, groups, pairs, shares)
        if "student" in pairs:
            statistics["matched_foreground"] = matched_foreground_share(teacher_group.logits, pairs["student"])
        return terms, statistics

    def _attention_terms(self, name, teacher_group, group, pairs, memory_masks, shares: Shares):
        args, terms = self.args, {}
        if args.self_attention_weight > 0:
            terms[f"{name}/self_attention"] = args.self_attention_weight * self_attention_distillation(
                teacher_group.self_attention,
                group.self_attention,
                pairs,
                shares.images,
                args.attention_divergence,
            )
        if args.cross_attention_weight > 0:
            terms[f"{name}/cross_attention"] = args.cross_attention_weight * cross_attention_distillation(
                teacher_group.cross_attention,
                group.cross_attention,
                pairs,
                *memory_masks,
                shares.images,
                args.attention_divergence,
            )
        return terms

    def _prediction_terms(self, teacher_group, groups, pairs, shares: Shares):
        weights = self._prediction_weights(teacher_group, pairs, shares)
        costs = self.args.class_weight, self.args.l1_weight, self.args.giou_weight
        return {
            f"{name}/prediction": self.args.prediction_weight
            * prediction_distillation(teacher_group, groups[name], matched, *weights[name], *costs)
            for name, matched in pairs.items()
        }

    def _aligned(self, teacher: QueryGroupOutput, layers: list[int], maps: bool = True) -> QueryGroupOutput:
        """The teacher's outputs in these of its layers, for the student's classes; no gradient reaches the teacher."""

        def chosen(values):
            return None if values is None else tuple(values[layer].detach() for layer in layers)

        logits = torch.stack(chosen(teacher.logits))
        self.class_index = self.class_index.to(logits.device)
        return QueryGroupOutput(
            logits=logits[..., : len(self.class_index)] if self._classes_in_order else logits[..., self.class_index],
            boxes=torch.stack(chosen(teacher.boxes)),
            self_attention=chosen(teacher.self_attention) if maps else None,
            cross_attention=chosen(teacher.cross_attention) if maps else None,
        )

    def _detection_terms(self, groups, teacher_group, teacher, targets: Targets, shares: Shares):
        terms = {}
        for name, group in groups.items():
            assignment = self._assignment(name, group, teacher_group, teacher, targets)
            losses = detection_losses(
                group, targets, assignment, shares.boxes, self.assigner.focal_alpha, self.assigner.focal_gamma
            )
            terms |= {f"{name}/{term}": self.detection_weights[term] * value for term, value in losses.items()}
        return terms

    def _assignment(
        self,
        name: str,
        group: QueryGroupOutput,
        teacher_group: QueryGroupOutput | None,
        teacher: DetectorOutput | None,
        targets: Targets,
    ) -> torch.Tensor:
        """Which object each query answers for, `(L, B, N)`; in the auxiliary group the teacher may decide.

        Args:
            teacher_group: the teacher's outputs in the layers that the student's follow.
            teacher: all of its outputs, of which the last layer decides under most policies.
        """
        policy = self.args.auxiliary_assignment
        if name == "student" or self.args.auxiliary_queries != "teacher" or policy == "own":
            return self.assigner(group, targets, name)
        if policy == "teacher_per_layer":
            return self.assigner(teacher_group, targets, "teacher")
        last = self.assigner(self._aligned(teacher.groups[0], [-1], maps=False), targets, "teacher (last layer)")
        if policy == "teacher_last_layer_everywhere":
            return last.expand(len(group.logits), -1, -1)
        earlier = self.assigner(QueryGroupOutput(logits=group.logits[:-1], boxes=group.boxes[:-1]), targets, name)
        return torch.cat([earlier, last])

    def _prediction_weights(self, teacher: QueryGroupOutput, pairs, shares: Shares):
        """Per group, the weight of each pair and what their sum is divided by, global over processes."""
        weights = {name: pair_weights(teacher.logits, p, self.args.prediction_normaliser) for name, p in pairs.items()}
        if self.args.prediction_normaliser == "pairs":
            return {name: (w, shares.images * w.shape[-1]) for name, w in weights.items()}
        # a weight's sum is known per batch only: scale by this batch's part of the images of the whole step
        totals = torch.stack([w.sum(dim=(1, 2)) for w in weights.values()])
        images = totals.new_full((1, totals.shape[1]), teacher.logits.shape[1])
        *totals, images = shares.average(torch.cat([totals, images])).unbind()
        return {
            name: (w, total * shares.images / images) for (name, w), total in zip(weights.items(), totals, strict=True)
        }
