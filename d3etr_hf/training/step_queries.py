"""The query groups of a training step beside the student's own: which there are, their sizes, and what is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from d3etr_hf.models.detector import Detector
from d3etr_hf.models.memory_methods import MEMORY_METHODS
from d3etr_hf.models.query_adapters import LearnedQueries, NoisedLabels, QueryAdapter
from d3etr_hf.outputs import AUXILIARY, OBJECT_QUERIES, ONE_TO_MANY, OWN, RANDOM_QUERIES, Queries, Targets
from d3etr_hf.training.denoising import NOISED, NoisedQueries, noised_queries
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.shared_queries import object_queries, random_queries
from d3etr_hf.training.teacher import Teacher, TeacherOutput


@dataclass(frozen=True)
class StepQueries:
    """What a student's decoder is given in training.

    Attributes:
        student: it holds the learned queries, see `attach_query_adapters`.
        teacher: None without one.
        options: which groups there are.
        seed: of the run, for queries that are drawn.
    """

    student: Detector
    teacher: Teacher | None
    options: Distillation
    seed: int

    def group_sizes(self) -> dict[str, float]:
        """Number of queries by the group's name; of one that is asked for each object several times, of one time."""
        options = self.options
        sizes: dict[str, float] = {OWN: self.student.query_count}
        if options.auxiliary_queries == "learned":
            sizes |= dict.fromkeys(options.auxiliary_names, self.student.query_count)
        elif options.auxiliary_queries == "teacher":
            sizes[AUXILIARY] = self.teacher.detector.query_count
        if options.one_to_many_queries > 0:
            sizes[ONE_TO_MANY] = options.one_to_many_queries / options.one_to_many_repeats
        return sizes

    def shared(self, targets: Targets, step: int) -> tuple[dict[str, Queries], dict[str, torch.Tensor]]:
        """By the group's name, the queries that both models are given but the teacher's own, and what they may see.

        Args:
            targets: the ground truth of the batch.
            step: the optimizer step, from 0, for which random ones are drawn.
        """
        queries, masks = {}, {}
        if RANDOM_QUERIES in self.options.shared_groups:
            detector = cast(Detector, self.teacher.detector)  # one that takes no queries has been refused
            queries[RANDOM_QUERIES] = random_queries(detector, self.options.shared_random_queries, self.seed, step)
        if OBJECT_QUERIES in self.options.shared_groups:
            detector, targets = cast(Detector, self.teacher.detector), targets.with_a_place()
            queries[OBJECT_QUERIES] = object_queries(detector, targets, len(self.student.class_names), self.seed)
            masks[OBJECT_QUERIES] = targets.visible
        return queries, masks

    def further(self, teacher: TeacherOutput | None) -> dict[str, Queries | None]:
        """The queries of the student's further groups but drawn ones; None for learned ones, which it holds itself.

        Args:
            teacher: what it says of the batch, whose queries may depend on the image; None where it is not asked.
        """
        options = self.options
        further: dict[str, Queries | None] = {}
        if options.auxiliary_queries == "learned":
            further = dict.fromkeys(options.auxiliary_names)
        if options.one_to_many_queries > 0:
            further[ONE_TO_MANY] = None
        theirs = [name for name in options.teacher_groups if name not in (RANDOM_QUERIES, OBJECT_QUERIES)]
        if not theirs:
            return further
        queries = self.teacher.queries() if teacher is None else teacher.queries.detach()
        both_make_anchors = self.student.makes_anchors and self.teacher.detector.makes_anchors
        if options.auxiliary_reference_points == "student" and both_make_anchors:
            queries = Queries(queries.content, queries.position)
        return further | dict.fromkeys(theirs, queries)

    def noised(self, labels: Sequence[Mapping[str, Any]], targets: Targets, step: int) -> NoisedQueries | None:
        """DN-DETR's queries of a batch; None where there are none.

        Args:
            labels: of its images, with their `image_id`.
            targets: the ground truth of the batch.
            step: the optimizer step, from 0, for which the noise is drawn.
        """
        if self.options.denoising_groups == 0:
            return None
        image_ids, classes = [label["image_id"] for label in labels], len(self.student.class_names)
        return noised_queries(targets, image_ids, classes, self.options, self.seed, step)


def attach_query_adapters(student: Detector, teacher: Teacher | None, options: Distillation) -> None:
    """Give the student what its further groups and comparisons of memories need, instead of anything from before."""
    student.query_adapters = torch.nn.ModuleDict()
    if options.auxiliary_queries == "learned":
        for name in options.auxiliary_names:
            student.query_adapters[name] = LearnedQueries(student.new_queries(student.query_count))
    if options.denoising_groups > 0:
        embedded = NoisedLabels(len(student.class_names), student.width)
        names = [f"{NOISED}_{number}" for number in range(1, options.denoising_groups + 1)]
        student.query_adapters.update(dict.fromkeys(names, embedded))
    if options.one_to_many_queries > 0:
        student.query_adapters[ONE_TO_MANY] = LearnedQueries(student.new_queries(options.one_to_many_queries))
    if options.teacher_groups:
        carried = QueryAdapter(teacher.detector.width, student.width)
        student.query_adapters.update(dict.fromkeys(options.teacher_groups, carried))
    for method in options.memory_methods:
        sizes = student.width, teacher.detector.width, student.memory_levels, len(student.class_names)
        student.query_adapters[method] = MEMORY_METHODS[method](*sizes)
    student.query_adapters.to(student.device)
