"""Checks of a student, its options and its data before the first step: handled, or refused with the way out."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import Dataset

from d3etr_hf.data import DetectionDataset
from d3etr_hf.errors import IncompatibleDataError, IncompatibleTeacherError, UnsupportedOptionError
from d3etr_hf.models.detector import Detector
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_models(student: Detector, teacher: Detector | None, args: D3etrTrainingArguments) -> None:
    """Refuse what cannot be distilled.

    Raises:
        IncompatibleTeacherError: no teacher where the options need one, a model of another type, layer dropout,
            reference points that one of the two does not have.
    """
    if not isinstance(args, D3etrTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: D3etrTrainer takes D3etrTrainingArguments")
    if teacher is not None and teacher is student:
        raise IncompatibleTeacherError("student and teacher are one and the same object: load the teacher on its own")
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and not isinstance(model, Detector):
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
    if args.auxiliary_queries == "teacher" and args.auxiliary_reference_points == "teacher":
        if student.anchor_size == 0 or teacher.anchor_size < student.anchor_size:
            raise IncompatibleTeacherError(
                f"auxiliary_reference_points='teacher': the teacher, a {teacher.title}, has reference points of "
                f"{teacher.anchor_size} numbers, the student, a {student.title}, takes {student.anchor_size}; leave "
                "the option at 'student'"
            )


def check_launch(accelerator: Accelerator, args: D3etrTrainingArguments) -> None:
    """Refuse ways of sharding a model that this trainer does not know.

    Raises:
        UnsupportedOptionError: several GPUs in one process, FSDP, DeepSpeed, whoever asked for them.
    """
    if args.n_gpu > 1 or accelerator.distributed_type in UNSUPPORTED:
        raise UnsupportedOptionError(
            f"several GPUs in one process, FSDP and DeepSpeed are not supported (here: {accelerator.distributed_type}"
            f", {args.n_gpu} GPUs in this process): start one process a GPU with `accelerate launch --multi_gpu`"
        )


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
