"""Train a Conditional DETR detector without a teacher: one that will teach, or a student to compare with.

    accelerate launch scripts/train.py configs/shapes/teacher.yaml
    accelerate launch scripts/train.py configs/bccd/teacher.yaml --data_folder data/bccd --output_dir runs/teacher

Stopped, it goes on where it was when it is called again with the same arguments.
"""

import sys
from pathlib import Path

# scripts/evaluate.py would hide the evaluate package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from d3etr_hf.cli.command_line import parse_arguments, run
from d3etr_hf.cli.training_run import USER_ERRORS, train_detector, without_distillation
from d3etr_hf.data import DataArguments
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


def main() -> None:
    types = (ModelArguments, DataArguments, D3etrTrainingArguments, CardArguments)
    model, data, training, card = parse_arguments(types, description=__doc__)
    without_distillation(training)
    train_detector(model, TeacherArguments(), data, training, card)


if __name__ == "__main__":
    run(main, USER_ERRORS)
