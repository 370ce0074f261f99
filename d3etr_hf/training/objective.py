"""The D3ETR objective: which loss is taken between which groups, with which pairs, weight and normaliser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from d3etr_hf.losses import (
    DetectionCriterion,
    box_distribution_distillation,
    cross_attention_distillation,
    hungarian_logits_distillation,
    moment_distillation,
    pair_weights,
    place_distillation,
    prediction_distillation,
    self_attention_distillation,
    space_of,
)
from d3etr_hf.matching import (
    AdaptiveMatcher,
    MatchedPairs,
    Problem,
    Solution,
    TaughtGroup,
    assignment_of,
    fixed_pairs,
    matched_foreground_share,
    start_solving,
)
from d3etr_hf.outputs import (
    AUXILIARY,
    NO_OBJECT,
    OBJECT_QUERIES,
    ONE_TO_MANY,
    OWN,
    SHARED_GROUPS,
    DetectorOutput,
    GroupOutput,
    Supervised,
    Targets,
)
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.instability import (
    ADAPTIVE,
    AUXILIARY_ASSIGNMENT,
    OWN_ASSIGNMENT,
    TEACHER_ASSIGNMENT,
    partners_of,
)
from d3etr_hf.training.memory_terms import memory_losses, teacher_quality
from d3etr_hf.training.teacher import TeacherOutput
from d3etr_hf.training.unlabeled import labeled_part

PAIRS, POSITIVES = "pairs", "positives"
# what logs call the model's own group
TITLES = {OWN: "student"}

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shares:
    """What sums over this batch are divided by, so that processes and accumulated batches add up to one mean.

    Exact for every term whose weights are known before the step. Those of prediction distillation with the "boxes"
    normaliser, of box distributions, of shared queries and of pairs that a score threshold counts are known one batch
    at a time: there it is the mean over batches of each one's weighted mean; and of the unions of assignments, by
    which D-FINE and DEIMv2 divide their losses of boxes, a batch's pairs an object stand for the step's (all of them
    exact over processes).

    Attributes:
        images: images of the whole step (all processes, all accumulated batches) / number of processes; see
            `D3etrObjective._counting`.
        objects: ground-truth objects, counted likewise; where the whole step has none they count as one.
        held: by group, those objects that find a query in it.
        labeled: those of the images that have ground truth, counted likewise; where the whole step has none they count
            as one. None: all images.
        average: the mean of a tensor over processes (the identity on one).
        counted: whether this batch's images are of the step; else they only let the process take part in what all
            processes do, and weigh nothing.
    """

    images: torch.Tensor
    objects: torch.Tensor
    held: Mapping[str, torch.Tensor]
    average: Callable[[torch.Tensor], torch.Tensor]
    counted: bool = True
    labeled: torch.Tensor | None = None

    @property
    def of_detection(self) -> torch.Tensor:
        """The images that a detection loss is of."""
        return self.images if self.labeled is None else self.labeled


class D3etrObjective:
    """L = L_det(student) + L_det(auxiliary) + sum over layers and groups of the distillation terms (see README).

    Args:
        options: which terms are on, their weights, the matcher's.
        criterion: the student's detection loss and label assignment.
        teacher_criterion: by which the teacher assigns ground truth to its queries; None without a teacher.
        tolerant: let a step whose costs are not finite go on (see `start_solving`).
    """

    def __init__(
        self,
        options: Distillation,
        criterion: DetectionCriterion,
        teacher_criterion: DetectionCriterion | None = None,
        tolerant: bool = False,
    ):
        self.options, self.criterion, self.tolerant = options, criterion, tolerant
        self.teacher_criterion = teacher_criterion
        # what each query of the last batch was matched with, by the names of `instability`; None: it is not kept
        self.partners: Terms | None = None
        self.matcher = AdaptiveMatcher(criterion.scores, *options.match_weights, options.matching_score_threshold)
        averaged = 1 + len(options.auxiliary_names) if options.group_reduction == "mean" else 1
        self.group_weight = options.detection_weight / averaged

    def start_teacher_assignment(self, teacher: TeacherOutput, targets: Targets) -> Callable[[], torch.Tensor] | None:
        """Begin to assign ground truth to the teacher's queries; to be called before the student's forward pass.

        Returns:
            A function that waits for int64 `(L, B, N_t)`, with L = 1 where its last layer decides; None where the
            options ask for no such assignment.

        Raises:
            NonFiniteCostError: a prediction of the teacher is NaN or infinite.
        """
        if not self.options.teacher_assigns:
            return None
        group = teacher.group if self.options.auxiliary_assignment == "teacher_per_layer" else teacher.last
        wait = start_solving({AUXILIARY: self._teachers_problem(group, targets)}, self.tolerant)
        return lambda: assignment_of(wait()[AUXILIARY], group.boxes.shape[2])

    def _teachers_problem(self, group: TaughtGroup, targets: Targets) -> Problem:
        """The assignment of ground truth to the teacher's queries."""
        return self.teacher_criterion.problem(group.probabilities, group.boxes, targets, "teacher")

    def __call__(
        self,
        student: DetectorOutput,
        teacher: TeacherOutput | None,
        targets: Targets,
        shares: Shares,
        teacher_assignment: Callable[[], torch.Tensor] | None = None,
    ) -> tuple[Terms, Terms]:
        """Every weighted loss term of one batch, and what is worth knowing of the matching.

        Args:
            student: its own group and, if there is one, the auxiliary.
            teacher: None where the options need none.
            teacher_assignment: from `start_teacher_assignment`.

        Returns:
            Terms, whose sum is the loss, named "group/term", `(L,)` each, or "memory/method", `(levels,)` each; and
            statistics, scalars without gradient.

        Raises:
            NonFiniteCostError: a prediction is NaN or infinite.
        """
        options, groups = self.options, student.groups
        if unknown := set(groups) - {OWN, AUXILIARY, ONE_TO_MANY, *options.auxiliary_names, *SHARED_GROUPS}:
            raise ValueError(f"the student has query groups {sorted(unknown)} that no term is of")
        problems, chosen = self._problems(student, teacher, targets)
        wait = start_solving(problems, self.tolerant) if problems else dict
        terms, statistics, pairs = Terms(), Terms(), dict[str, MatchedPairs]()
        if AUXILIARY in options.distilled_groups:  # threads assign meanwhile
            pairs[AUXILIARY] = fixed_pairs(teacher.group, groups[AUXILIARY])
            terms |= self._attention_terms(AUXILIARY, teacher, student, pairs[AUXILIARY], shares)
        solutions = wait()
        if OWN in options.distilled_groups:
            pairs[OWN] = self.matcher.pairs(solutions.pop(PAIRS), chosen, teacher.group)
            counting = self._counting(teacher.group, pairs[OWN], shares)
            terms |= self._attention_terms(OWN, teacher, student, pairs[OWN], counting)
            terms |= self._logits_terms(teacher.group, groups[OWN], pairs[OWN], solutions, counting)
            statistics["matched_foreground"] = matched_foreground_share(teacher.group.probabilities, pairs[OWN])
        found = {name: assignment_of(of, problems[name].cost.shape[2]) for name, of in solutions.items()}
        given = None if teacher_assignment is None else teacher_assignment()
        if options.detection_weight > 0:
            terms |= self._detection_terms(student, targets, *self._assignments(found, given, groups), shares)
        if pairs:
            terms |= self._terms_of_pairs(teacher.group, groups, pairs, shares)
        terms |= self._memory_terms(student, teacher, targets, shares)
        terms |= self._shared_query_terms(teacher, groups, targets, shares)
        if self.partners is not None:
            self.partners = self._partners(pairs.get(OWN), teacher, found, given)
        return terms if shares.counted else {name: 0 * term for name, term in terms.items()}, statistics

    @staticmethod
    def _partners(
        pairs: MatchedPairs | None, teacher: TeacherOutput | None, own: Terms, given: torch.Tensor | None
    ) -> Terms:
        """By the names of `instability`, what each query was matched with, `(·, B, N)`; -1 in layers without."""
        if given is not None and AUXILIARY in own:  # in the layers before, its group assigns itself
            given = torch.cat([torch.full_like(own[AUXILIARY], -1), given])
        kinds = {
            ADAPTIVE: None if pairs is None else partners_of(pairs, teacher.group.boxes.shape[2]),
            OWN_ASSIGNMENT: own.get(OWN),
            AUXILIARY_ASSIGNMENT: own.get(AUXILIARY),
            TEACHER_ASSIGNMENT: given,
        }
        return {kind: partners for kind, partners in kinds.items() if partners is not None}

    def _problems(self, student: DetectorOutput, teacher: TeacherOutput | None, targets: Targets):
        """What is to be assigned for this batch, by name, and the teacher's queries that adaptive matching chose."""
        problems, chosen = {}, None
        if OWN in self.options.distilled_groups:
            problems[PAIRS], chosen = self.matcher.problem(teacher.group, student.groups[OWN])
        if self.options.logits_distillation_weight > 0:
            problems[POSITIVES] = self._teachers_problem(teacher.group, targets)
        if self.options.detection_weight == 0:
            return problems, chosen
        asked = {name: group for name, group in _of_truth(student).items() if self._assigns_itself(name)}
        truth = dict.fromkeys(asked, targets)
        for name, part in self._supervised(student, targets).items():
            if part.assignment is None:
                asked[name], truth[name] = part.group, part.targets or targets
        for name, group in asked.items():
            logits, boxes = group.logits, group.boxes
            if name == AUXILIARY and self.options.teacher_assigns:
                logits, boxes = logits[:-1], boxes[:-1]  # of the last layer the teacher decides
            probabilities = self.criterion.scores.probabilities(logits)
            problems[name] = self.criterion.problem(probabilities, boxes, truth[name], TITLES.get(name, name))
        return problems, chosen

    def _assigns_itself(self, group: str) -> bool:
        """Whether ground truth is assigned to a group's own predictions, in some layers at least."""
        given = group == AUXILIARY and self.options.teacher_assigns
        return not given or self.options.auxiliary_assignment == "teacher_last_layer"

    def _assignments(
        self, own: Terms, teachers: torch.Tensor | None, groups: Mapping[str, GroupOutput]
    ) -> tuple[Terms, Terms]:
        """By name, the assignments of what was solved and of what the teacher assigned, and those of boxes alone."""
        if teachers is None:
            return own, self.criterion.box_assignments(own)
        # what the teacher assigned counts for boxes, too
        of_boxes = self.criterion.box_assignments({name: of for name, of in own.items() if name != AUXILIARY})
        given = self._given(own.get(AUXILIARY), teachers, groups[AUXILIARY])
        return own | {AUXILIARY: given}, of_boxes

    def _given(self, own: torch.Tensor | None, teachers: torch.Tensor, group: GroupOutput) -> torch.Tensor:
        """The auxiliary group's assignment `(L, B, N)`: the teacher's, after its own of the earlier layers."""
        if own is not None:
            return torch.cat([own, teachers])
        return teachers.expand(len(group.boxes), -1, -1)

    def _detection_terms(
        self, student: DetectorOutput, targets: Targets, assignments: Terms, of_boxes: Terms, shares: Shares
    ) -> Terms:
        """The criterion's terms of all groups, and of what ground truth alone supervises, over images with labels.

        Args:
            assignments: by name, of those that bring none of their own.
            of_boxes: the criterion's `box_assignments`.
        """
        acts = targets.labeled is None or any(targets.labeled)
        student, targets, (assignments, of_boxes) = labeled_part(student, targets, assignments, of_boxes)
        terms: Terms = {}
        pairs = _counted_pairs(of_boxes, sum(targets.counts), shares)

        def add(name: str, part: Supervised, weight: float, held: torch.Tensor) -> None:
            queries, repeats = shares.of_detection * part.group.boxes.shape[2], part.repeats or 1
            normalisers = self.criterion.normalisers(shares.objects * repeats, held * repeats, queries)
            assignment = assignments[name] if part.assignment is None else part.assignment
            box_assignment = None
            if name in of_boxes:
                box_assignment = of_boxes[name].expand_as(assignment)
                normalisers |= dict.fromkeys(self.criterion.box_terms, pairs[name])
            losses = self.criterion.losses(part.group, part.targets or targets, assignment, box_assignment)
            for term, value in losses.items():
                scale = weight * self.criterion.weights[term]
                terms[f"{TITLES.get(name, name)}/{term}"] = scale * value / normalisers[term]

        for name, group in _of_truth(student).items():
            repeats = student.repeats if name == OWN else None
            add(name, Supervised(group=group, repeats=repeats), self.group_weight, shares.held[name])
        for name, part in self._supervised(student, targets).items():
            weight = self.group_weight if part.of_group else self.options.detection_weight
            weight *= self.options.one_to_many_weight if name == ONE_TO_MANY else 1
            add(name, part, weight, shares.held.get(name, shares.objects))
        return terms if acts else {name: 0 * term for name, term in terms.items()}

    def _supervised(self, student: DetectorOutput, targets: Targets) -> dict[str, Supervised]:
        """By name, what ground truth alone supervises; H-DETR's branch by the objects, several times each."""
        found, repeats = dict(student.supervised or {}), self.options.one_to_many_repeats
        if ONE_TO_MANY in student.groups:
            found[ONE_TO_MANY] = Supervised(
                group=student.groups[ONE_TO_MANY], repeats=repeats, targets=targets.repeated(repeats)
            )
        return found

    def _attention_terms(
        self, name: str, teacher: TeacherOutput, student: DetectorOutput, pairs: MatchedPairs, shares: Shares
    ) -> Terms:
        options, group, title, terms = self.options, student.groups[name], TITLES.get(name, name), {}
        if options.self_attention_weight > 0:
            terms[f"{title}/self_attention"] = options.self_attention_weight * self_attention_distillation(
                teacher.group.self_attention, group.self_attention, pairs, shares.images, options.attention_divergence
            )
        if options.cross_attention_weight > 0:
            terms[f"{title}/cross_attention"] = options.cross_attention_weight * self._cross_attention_term(
                teacher, student, group, pairs, shares
            )
        return terms

    def _cross_attention_term(
        self,
        teacher: TeacherOutput,
        student: DetectorOutput,
        group: GroupOutput,
        pairs: MatchedPairs,
        shares: Shares,
    ) -> torch.Tensor:
        """`(L,)`, unweighted, in the space that the options name."""
        theirs, ours, images = teacher.group.cross_attention, group.cross_attention, shares.images
        masks = teacher.memory_mask, student.memory_mask
        space = self.options.cross_attention_space
        space = space_of(theirs, ours) if space == "auto" else space
        if space == "places":
            return place_distillation(theirs, ours, pairs, images)
        if space == "moments":
            return moment_distillation(theirs, ours, pairs, *masks, images)
        divergence = self.options.attention_divergence
        return cross_attention_distillation(theirs, ours, pairs, *masks, images, divergence)

    def _terms_of_pairs(
        self, teacher: TaughtGroup, groups: Mapping[str, GroupOutput], pairs: dict[str, MatchedPairs], shares: Shares
    ) -> Terms:
        of_predictions = self._prediction_terms(teacher, groups, pairs, shares)
        return of_predictions | self._box_distribution_terms(teacher, groups, pairs, shares)

    def _prediction_terms(
        self, teacher: TaughtGroup, groups: Mapping[str, GroupOutput], pairs: dict[str, MatchedPairs], shares: Shares
    ) -> Terms:
        if self.options.prediction_weight == 0:
            return {}
        weights, totals = self._pair_weights(teacher, pairs, shares, self.options.prediction_normaliser)
        return {
            f"{TITLES.get(name, name)}/prediction": self.options.prediction_weight
            * self._predictions(teacher, groups[name], matched, weights[name], totals[name])
            for name, matched in pairs.items()
        }

    def _predictions(
        self,
        teacher: TaughtGroup,
        group: GroupOutput,
        pairs: MatchedPairs,
        weights: torch.Tensor,
        total: torch.Tensor,
    ) -> torch.Tensor:
        scores, costs = self.criterion.scores, self.options.match_weights
        return prediction_distillation(teacher, group, pairs, scores, weights, total, costs)

    def _box_distribution_terms(
        self, teacher: TaughtGroup, groups: Mapping[str, GroupOutput], pairs: dict[str, MatchedPairs], shares: Shares
    ) -> Terms:
        if self.options.box_distribution_weight == 0:
            return {}
        # most queries are of background, and their edges mean nothing
        weights, totals = self._pair_weights(teacher, pairs, shares, "boxes")
        return {
            f"{TITLES.get(name, name)}/box_distribution": self.options.box_distribution_weight
            * box_distribution_distillation(teacher, groups[name], matched, weights[name], totals[name])
            for name, matched in pairs.items()
        }

    def _memory_terms(
        self, student: DetectorOutput, teacher: TeacherOutput | None, targets: Targets, shares: Shares
    ) -> Terms:
        """Per method the mean over the levels of the student's memory, `(levels,)`: each level's part of it."""
        terms: Terms = {}
        quality = None
        if self.options.detrdistill_memory_weight > 0:
            quality = teacher_quality(self.teacher_criterion, teacher, targets, self.tolerant)
        for method in self.options.memory_methods:
            losses = memory_losses(method, student, teacher, targets, shares.images, shares.objects, quality)
            terms[f"memory/{method}"] = getattr(self.options, f"{method}_weight") * losses / len(losses)
        return terms

    def _logits_terms(
        self,
        teacher: TaughtGroup,
        group: GroupOutput,
        pairs: MatchedPairs,
        solutions: dict[str, Solution],
        shares: Shares,
    ) -> Terms:
        """DETRDistill's: a sum over positive pairs, an object of the step, and one over negatives, a pair of any kind.

        What holds an object is taken from the solutions.
        """
        options = self.options
        if POSITIVES not in solutions:
            return {}
        positive = assignment_of(solutions.pop(POSITIVES), teacher.boxes.shape[2]) != NO_OBJECT
        scores, costs = self.criterion.scores, options.match_weights
        sums = hungarian_logits_distillation(teacher, group, pairs, positive, scores, costs)
        all_pairs = shares.images * pairs.teacher.shape[-1]
        value = sums[0] / shares.objects + options.logits_negative_weight * sums[1] / all_pairs
        if options.logits_layer_weights is not None:
            value = value * value.new_tensor(options.logits_layer_weights)
        return {f"{TITLES[OWN]}/logits": options.logits_distillation_weight * value}

    def _shared_query_terms(
        self, teacher: TeacherOutput | None, groups: Mapping[str, GroupOutput], targets: Targets, shares: Shares
    ) -> Terms:
        """Of queries that both were given; see `shared_queries`."""
        terms: Terms = {}
        for name in self.options.shared_groups:
            taught = teacher.shared.get(name, teacher.group)  # of its own queries what it says anyway
            pairs = {name: fixed_pairs(taught, groups[name])}
            if name == OBJECT_QUERIES:  # images with fewer objects have places that stand for none
                present = targets.with_a_place().present.expand_as(pairs[name].teacher)
                pairs[name] = replace(pairs[name], counted=present)
            weights, totals = self._pair_weights(taught, pairs, shares, "boxes")
            terms[f"{name}/shared_query"] = self.options.shared_query_weight * self._predictions(
                taught, groups[name], pairs[name], weights[name], totals[name]
            )
        return terms

    @staticmethod
    def _pair_weights(teacher: TaughtGroup, pairs: dict[str, MatchedPairs], shares: Shares, normaliser: str):
        """Per group, the weight of each pair and what their sum is divided by, global over processes."""
        weights = {name: pair_weights(teacher.probabilities, p, normaliser) for name, p in pairs.items()}
        if normaliser == "pairs" and all(p.counted is None for p in pairs.values()):
            return weights, {name: shares.images * weight.shape[-1] for name, weight in weights.items()}
        # a weight's sum is known per batch only: scale by this batch's part of the images of the whole step
        totals = torch.stack([weight.sum(dim=(1, 2)) for weight in weights.values()])
        images = totals.new_full((1, totals.shape[1]), teacher.boxes.shape[1])
        if not shares.counted:
            totals, images = 0 * totals, 0 * images
        *of_groups, images = shares.average(torch.cat([totals, images])).unbind()
        found = {n: total * shares.images / images for n, total in zip(weights, of_groups, strict=True)}
        return weights, {name: torch.where(total > 0, total, 1) for name, total in found.items()}

    def _counting(self, teacher: TaughtGroup, pairs: MatchedPairs, shares: Shares) -> Shares:
        """With so many images, `(L,)`, as have all their pairs counted, where only some of the pairs are."""
        if pairs.counted is None:
            return shares
        _, totals = self._pair_weights(teacher, {OWN: pairs}, shares, "pairs")
        return replace(shares, images=totals[OWN] / pairs.counted.shape[-1])


def _of_truth(student: DetectorOutput) -> dict[str, GroupOutput]:
    """The groups that ground truth is asked of, once."""
    return {name: group for name, group in student.groups.items() if name not in (*SHARED_GROUPS, ONE_TO_MANY)}


def _counted_pairs(assignments: Terms, objects: int, shares: Shares) -> Terms:
    """How many pairs each of these has in the whole step, as `Shares` counts objects; none at all count as one.

    Exact over processes; with accumulated batches each one's pairs an object are taken for those of the step.

    Args:
        assignments: by name int64 `(B, N)`, on every process the same names.
        objects: ground-truth objects of this batch.
    """
    if not assignments:
        return {}
    counts = [(of != NO_OBJECT).sum().to(shares.images) for of in assignments.values()]
    batch = torch.full_like(counts[0], objects)  # none of a batch that does not count
    *pairs, batch = shares.average(torch.stack([*counts, batch])).unbind()
    return {n: torch.where(of > 0, of * shares.objects / batch, 1) for n, of in zip(assignments, pairs, strict=True)}
