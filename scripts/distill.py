"""Distil a Conditional DETR student from a teacher by D3ETR.

    accelerate launch scripts/distill.py configs/shapes/distill.yaml
    accelerate launch scripts/distill.py configs/bccd/distill.yaml --data_folder data/bccd --output_dir runs/student

`--auxiliary_queries learned --adaptive_matching false` is the teacherless control. Stopped, it goes on where it was
when it is called again with the same arguments.
"""

import sys
from pathlib import Path

# scripts/evaluate.py would hide the evaluate package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from d3etr_hf.cli.command_line import parse_arguments, run
from d3etr_hf.cli.training_run import USER_ERRORS, train_detector
from d3etr_hf.data import DataArguments
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


def main() -> None:
    types = (ModelArguments, TeacherArguments, DataArguments, D3etrTrainingArguments, CardArguments)
    train_detector(*parse_arguments(types, description=__doc__))


if __name__ == "__main__":
    run(main, USER_ERRORS)
