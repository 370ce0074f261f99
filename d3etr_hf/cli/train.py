"""Train a detector without a teacher: one that will teach, or a student to compare with.

    d3etr train configs/shapes/teacher.yaml
    d3etr train configs/bccd/teacher.yaml --data_folder data/bccd --output_dir runs/teacher

Stopped, it goes on where it was when it is called again with the same arguments.
"""

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import CommandLineError
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.training.training_arguments import DISTILLATION_OPTIONS, D3etrTrainingArguments

TYPES = (ModelArguments, DataArguments, D3etrTrainingArguments, CardArguments)


def main() -> None:
    """What `d3etr train` runs."""
    model, data, training, card = parse_arguments(TYPES, description=__doc__)
    without_distillation(training)
    train_detector(model, TeacherArguments(), data, training, card)


def without_distillation(training_arguments: D3etrTrainingArguments) -> None:
    """Set the options to plain training, in place.

    Raises:
        CommandLineError: an option of the distillation was given, which plain training would pass over in silence.
    """
    fields = D3etrTrainingArguments.__dataclass_fields__
    names = (*DISTILLATION_OPTIONS, "teacher_cache")
    given = [name for name in names if getattr(training_arguments, name) != fields[name].default]
    if given:
        raise CommandLineError(f"{given} belong to distillation, which plain training does not do: d3etr distill")
    training_arguments.auxiliary_queries, training_arguments.adaptive_matching = "none", False
