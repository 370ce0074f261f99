"""COCO average precision of a detector: a run's, or any checkpoint of a supported family.

    d3etr evaluate --model runs/demo/distilled --data_folder data/shapes

Prints every metric and writes it to evaluation.json in --output_dir.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments, check_places, load_splits
from d3etr_hf.data.image_sizes import describe_image_size
from d3etr_hf.files import write_json
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.models.loading import load_detector
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.runs.output_folder import refuse_split_launch
from d3etr_hf.training.processes import on_main_process
from d3etr_hf.training.teacher import with_classes_of
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


@dataclass
class EvaluationArguments:
    """What to evaluate, and where the result goes."""

    model: str = field(metadata={"help": "The detector: a folder or Hub id."})
    output_dir: str = option("runs/evaluation", "Gets evaluation.json.")
    batch_size: int = option(8, "Images per device; predictions depend a little on which images share a batch.")
    workers: int = option(0, "Processes that load images, per device.")
    use_cpu: bool = option(False, "Do not use a GPU.")


def main() -> None:
    """What `d3etr evaluate` runs."""
    arguments, data = parse_arguments((EvaluationArguments, DataArguments), description=__doc__)
    metrics = evaluate_detector(data, **vars(arguments))
    for name, value in metrics.items() if os.environ.get("RANK", "0") == "0" else ():
        print(f"{name:<28}{value:.4f}")


def evaluate_detector(
    data_arguments: DataArguments, model: str, output_dir: str, batch_size: int = 8, workers: int = 0, use_cpu=False
) -> dict[str, float]:
    """COCO metrics (0..1) of a saved detector on the validation split, also written to `evaluation.json`.

    The detector's own image processor scales the pixels, to its own size unless the data arguments give another.

    Raises:
        DetectorLoadError, DatasetError, IncompatibleTeacherError: the model or the data cannot be read.
    """
    training_arguments = D3etrTrainingArguments(
        output_dir=output_dir,
        per_device_eval_batch_size=batch_size,
        dataloader_num_workers=workers,
        use_cpu=use_cpu,
        auxiliary_queries="none",
        adaptive_matching=False,
        report_to="none",
    )
    refuse_split_launch(training_arguments)
    check_places(data_arguments)
    detector = load_detector(model)
    processor: Any = image_processor_of(detector.config.model_type, model)
    _, val = load_splits(data_arguments, processor, trains=False, decide=on_main_process)
    detector = with_classes_of(detector, val.class_names, "model")
    trainer = D3etrTrainer(model=detector, args=training_arguments, eval_dataset=val, processing_class=processor)
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    metrics = {name: value for name, value in metrics.items() if name.startswith(("AP", "AR"))}
    if trainer.is_world_process_zero():
        size = describe_image_size(processor)
        write_json(Path(output_dir) / "evaluation.json", {"model": model, "data": val.name, **size, **metrics})
    return metrics
