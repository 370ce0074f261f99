"""Checks of a student, its options and its data before the first step: handled, or refused with the way out."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from d3etr_hf.data import DetectionDataset, DetectionTransform
from d3etr_hf.data.image_sizes import size_of, takes_fixed_size
from d3etr_hf.errors import (
    ImageSizeError,
    IncompatibleDataError,
    IncompatibleTeacherError,
    UnsupportedOptionError,
    quoted,
)
from d3etr_hf.evaluation.coco_average_precision import STATISTICS
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import require_fixed_size
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.training.denoising import check_denoising
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.option_checks import wants_best
from d3etr_hf.training.shared_queries import check_shared_queries
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.unlabeled import check_unlabeled

logger = logging.get_logger(__name__)


def check_models(student: Detector, teacher: Detector | OtherDetector | None, args: D3etrTrainingArguments) -> None:
    """Refuse what cannot be distilled.

    Raises:
        IncompatibleTeacherError: no teacher where the options need one, a model of another type, layer dropout,
            reference points, queries or box distributions that one of the two does not have.
        UnsupportedOptionError: denoising for a student whose queries have no anchors.
    """
    if not isinstance(args, D3etrTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: D3etrTrainer takes D3etrTrainingArguments")
    if teacher is not None and teacher is student:
        raise IncompatibleTeacherError("student and teacher are one and the same object: load the teacher on its own")
    for role, model in (("student", student), ("teacher", teacher)):
        allowed = (Detector, OtherDetector) if role == "teacher" else Detector
        if model is not None and not isinstance(model, allowed):
            raise IncompatibleTeacherError(
                f"the {role} is a {type(model).__name__}: load it with d3etr_hf.models.loading.load_detector(...), "
                "which takes any checkpoint of a supported family, or with the family's own class"
            )
    if args.distillation.needs_teacher and teacher is None:
        raise IncompatibleTeacherError(
            "these options read a teacher but none was given: pass teacher=..., or set auxiliary_queries to "
            "'learned' or 'none' and adaptive_matching to false"
        )
    if student.skipped_layers is not None:
        raise IncompatibleTeacherError(
            f"the student's {student.skipped_layers}: skipped layers have nothing to match; set it to 0"
        )
    check_denoising(student, args.distillation)
    _check_distributions(student, teacher, args)
    _check_memory(student, teacher, args)
    weights = args.logits_layer_weights
    if weights is not None and len(weights) != student.decoder_depth:
        raise IncompatibleTeacherError(
            f"logits_layer_weights={weights}: it needs one for each of the student's {student.decoder_depth} layers"
        )
    check_shared_queries(student, teacher, args.distillation)
    takes_queries = args.auxiliary_queries == "teacher" and not teacher.predictions_only
    if takes_queries and args.auxiliary_reference_points == "teacher":
        if student.anchor_size == 0 or teacher.anchor_size < student.anchor_size:
            raise IncompatibleTeacherError(
                f"auxiliary_reference_points='teacher': the teacher, a {teacher.title}, has reference points of "
                f"{teacher.anchor_size} numbers, the student, a {student.title}, takes {student.anchor_size}; leave "
                "the option at 'student'"
            )


def _check_distributions(
    student: Detector, teacher: Detector | OtherDetector | None, args: D3etrTrainingArguments
) -> None:
    if args.box_distribution_weight == 0 or teacher is None:
        return
    for role, model in (("student", student), ("teacher", teacher)):
        if not model.predicts_distributions and not model.predictions_only:
            raise IncompatibleTeacherError(
                f"box_distribution_weight={args.box_distribution_weight}: the {role}, a {model.title}, predicts no "
                "box distributions; set it to 0"
            )


def _check_memory(student: Detector, teacher: Detector | OtherDetector | None, args: D3etrTrainingArguments) -> None:
    methods = args.distillation.memory_methods
    if not methods or teacher is None:
        return
    if teacher.predictions_only:
        options = [f"{name}_weight" for name in methods]
        raise IncompatibleTeacherError(
            f"{', '.join(options)}: the teacher, a {teacher.title}, has predictions only, and no encoder memory that "
            "could be compared; set them to 0, or take a teacher of a supported family"
        )
    if args.vidt_weight > 0 and student.query_count != teacher.query_count:
        raise IncompatibleTeacherError(
            f"vidt_weight={args.vidt_weight}: queries are compared place by place, and the teacher has "
            f"{teacher.query_count}, the student {student.query_count}; set it to 0, or take as many"
        )


def terms_in_common(options: Distillation, teacher: Detector | OtherDetector | None) -> Distillation:
    """The options, without what this teacher does not have; what is left out is said.

    Raises:
        IncompatibleTeacherError: nothing is left to be learned from it.
    """
    if teacher is None or not teacher.predictions_only or not options.needs_teacher:
        return options
    left = options.of_predictions()
    lacking = ("self_attention", "cross_attention", "box_distribution")
    missing = [name for name in lacking if getattr(options, f"{name}_weight") > 0]
    if left.auxiliary_queries != options.auxiliary_queries:
        missing.append("the auxiliary group of its queries")
    if not left.distilled_groups:
        raise IncompatibleTeacherError(
            f"the teacher, a {teacher.title}, can teach its predictions only, and these options learn none of them: "
            "set adaptive_matching to true and prediction_weight above 0"
        )
    logger.warning(
        f"the teacher, a {teacher.title}, has predictions only; left out: {', '.join(missing) or 'nothing'}"
    )
    return left


def check_use_of_data(
    args: D3etrTrainingArguments,
    class_names: list[str],
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    own_metrics: bool,
) -> None:
    """Refuse options for which there is no data, or no metric, and data that they leave unused; see the checks.

    Args:
        class_names: of the data.
        own_metrics: whether evaluation computes somebody's own metrics, of which nothing is known.

    Raises:
        UnsupportedOptionError: see there.
    """
    named = eval_dataset if isinstance(eval_dataset, dict) else {}
    check_steps(args, train_dataset)
    if isinstance(train_dataset, DetectionDataset) and train_dataset.unlabeled is not None:
        check_unlabeled(args.distillation, args.schedule)
    check_evaluation(args, list(named.values()) or [eval_dataset])
    if not own_metrics:
        check_best_metric(args, class_names, tuple(named))


def check_steps(args: Any, train_dataset: Any) -> None:
    """Refuse data of which no batch can be made; evaluation alone needs none.

    Raises:
        UnsupportedOptionError: not one step would be trained.
    """
    if train_dataset is None:
        return
    images = train_dataset.images_of_epoch if isinstance(train_dataset, DetectionDataset) else len(train_dataset)
    if len(train_dataset) == 0:
        raise UnsupportedOptionError("train_dataset holds no image, so not one step would be trained: give others")
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    if args.dataloader_drop_last and images < args.train_batch_size * processes:
        raise UnsupportedOptionError(
            f"dataloader_drop_last=True, per_device_train_batch_size={args.per_device_train_batch_size} on "
            f"{processes} processes: train_dataset has {images} images, not one whole batch, so not one step would be "
            "trained; lower the batch size, or leave dataloader_drop_last off"
        )


def check_evaluation(args: Any, datasets: Sequence[Any]) -> None:
    """Refuse an evaluation without data.

    Args:
        datasets: those of evaluation; None for one that is not there.

    Raises:
        UnsupportedOptionError: options ask for evaluation, and there is nothing to evaluate.
    """
    asked_for = args.eval_strategy != "no" or args.eval_on_start
    if asked_for and not any(dataset is not None and len(dataset) for dataset in datasets):
        raise UnsupportedOptionError(
            f"eval_strategy={args.eval_strategy.value!r}, eval_on_start={args.eval_on_start}: there is no eval_dataset"
            ", or no image in it"
        )


def check_best_metric(
    args: D3etrTrainingArguments, class_names: list[str] | None = None, datasets: tuple[str, ...] = ()
) -> None:
    """Refuse to choose the best by a metric that this trainer's evaluation does not give.

    Args:
        class_names: of the data; None where they are not known yet, and any may be meant.
        datasets: names of several evaluated data sets, which come before the metrics' names.

    Raises:
        UnsupportedOptionError: there is no such metric.
    """
    if not wants_best(args):
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    known = [*STATISTICS, *(f"AP/{name}" for name in class_names or ())]
    if datasets:
        known = [f"{dataset}_{name}" for dataset in datasets for name in known]
    if metric not in known and not (class_names is None and metric.startswith("AP/")):
        more = ", ..." if len(known) > 12 or class_names is None else ""
        raise UnsupportedOptionError(
            f"metric_for_best_model={quoted(metric)}: evaluation gives no such figure, but "
            f"{', '.join(known[:12])}{more}"
        )


def named_datasets(
    train_dataset: Dataset | None, eval_dataset: Dataset | dict[str, Dataset] | None
) -> dict[str, Dataset | None]:
    """What a trainer is given, by what errors call it."""
    of_evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    return {"train_dataset": train_dataset, **of_evaluation}


def check_data(
    student: Detector, image_processor: BaseImageProcessor | None, datasets: dict[str, Dataset | None]
) -> None:
    """The student's data must be of its classes, and hold images that it can take; see the two checks.

    Raises:
        IncompatibleDataError, ImageSizeError: they are not, or do not.
    """
    check_data_classes(student, datasets)
    check_images(student, image_processor, datasets)


def check_data_classes(student: Detector, datasets: dict[str, Dataset | None]) -> None:
    """The student's outputs must be the data's classes, in their order.

    Args:
        datasets: `DetectionDataset`s by what the error calls them; None is passed over.

    Raises:
        IncompatibleDataError: they are not, or a data set does not know its classes.
    """
    names = student.class_names
    for role, dataset in datasets.items():
        if dataset is None:
            continue
        if not isinstance(dataset, DetectionDataset):
            raise IncompatibleDataError(
                f"{role} is a {type(dataset).__name__}: pass a DetectionDataset (its select() makes a part of it)"
            )
        if dataset.class_names != names:
            raise IncompatibleDataError(
                f"{role} has the classes {dataset.class_names[:5]} ..., the student's configuration {names[:5]} ...: "
                "build the student with the data set's id2label and label2id"
            )


def check_images(
    model: Detector | OtherDetector,
    image_processor: BaseImageProcessor | None,
    datasets: dict[str, Dataset | None],
    role: str = "student",
) -> None:
    """Refuse images that a model cannot take, before the first step would.

    Args:
        model: who sees them.
        image_processor: the model's, as the trainer was given it; None where it was not.
        datasets: by what the error calls them; what has no `DetectionTransform` is passed over.
        role: student or teacher.

    Raises:
        ImageSizeError: padding for a model that reads none, or one size for all images, at evaluation or drawn in
            training, that the model cannot take.
    """
    if image_processor is not None:
        require_fixed_size(model, image_processor, f"the {role}'s image processor")
    for name, dataset in datasets.items():
        if not isinstance(dataset, DetectionDataset) or not isinstance(dataset.transform, DetectionTransform):
            continue
        seen, sizes = _images_for(role, dataset.transform)
        require_fixed_size(model, seen, f"the image processor by which {name} makes images for the {role}")
        for height, width in sizes:
            try:
                model.check_image(height, width)
            except ImageSizeError as error:
                raise ImageSizeError(
                    f"{name} has, for the {role}, {error} (image_size is the one at evaluation, augmentation_short_"
                    "sides are those that training draws from)"
                ) from error


def _images_for(role: str, transform: DetectionTransform) -> tuple[BaseImageProcessor, list[tuple[int, int]]]:
    """Who makes a model's images, and all heights and widths in pixels of those that are of one size."""
    processor, drawn = transform.image_processor, []
    if role == "teacher" and transform.teacher_processor is not None:
        processor = transform.teacher_processor
    elif transform.augmentation is not None:
        drawn = list(transform.augmentation.batch_sizes)
    size = size_of(processor)
    return processor, drawn + ([(size.height, size.width)] if takes_fixed_size(processor) else [])
