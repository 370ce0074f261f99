"""Distil a student detector from a teacher by D3ETR.

    d3etr distill configs/shapes/distill.yaml
    d3etr distill configs/bccd/distill.yaml --data_folder data/bccd --output_dir runs/student

`--auxiliary_queries learned --adaptive_matching false` is the teacherless control. Stopped, it goes on where it was
when it is called again with the same arguments.
"""

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.data import DataArguments
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

TYPES = (ModelArguments, TeacherArguments, DataArguments, D3etrTrainingArguments, CardArguments)


def main() -> None:
    """What `d3etr distill` runs."""
    train_detector(*parse_arguments(TYPES, description=__doc__))
