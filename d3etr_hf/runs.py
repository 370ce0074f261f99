"""One training run in one output folder: guarded, resumable, with its results beside its model."""

import json
import tempfile
import time
from pathlib import Path

import yaml
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from .arguments import D3etrTrainingArguments
from .command_line import write_configuration
from .compatibility import IncompatibleDataError, IncompatibleTeacherError, class_index_by_name, spread_layers
from .data import DataArguments, DatasetError, load_splits
from .models import inherit_from_teacher
from .models.loading import (
    DetectorLoadError,
    ModelArguments,
    TeacherArguments,
    build_model,
    class_names_of,
    keep_classes,
    load_detector,
    load_image_processor,
)
from .trainer import D3etrTrainer, NonFiniteLossError
from .yaml_files import ConfigurationLoader

logger = logging.get_logger(__name__)

CONFIGURATION, RESULTS, HISTORY, SECONDS = "run.yaml", "results.json", "log_history.json", "seconds.json"


class OutputFolderError(ValueError):
    """The output folder holds something that this run would overwrite."""


def train_detector(
    model_arguments: ModelArguments,
    teacher_arguments: TeacherArguments,
    data_arguments: DataArguments,
    training_arguments: D3etrTrainingArguments,
) -> dict:
    """Train, evaluate and save one detector; go on where an interrupted run of the same configuration stopped.

    A run that goes on ends as if nothing had stopped it, save that within an epoch the rest of that epoch draws its
    augmentation anew (a data loader fetches ahead of the random state that a checkpoint holds).

    Returns:
        The results, as written to `results.json`: AP and AP50 (0..1) and all other metrics, parameters, optimizer
        steps, and seconds of training (summed over interruptions; without evaluation before or after it).

    Raises:
        OutputFolderError: the output folder holds another run, or files that are no run.
    """
    output = Path(training_arguments.output_dir)
    configuration = describe_run(model_arguments, teacher_arguments, data_arguments, training_arguments)
    checkpoint = check_output_folder(output, configuration)
    if (output / RESULTS).exists():
        logger.warning(f"{output} holds this run already, finished: nothing to do")
        return json.loads((output / RESULTS).read_text())
    set_seed(training_arguments.seed)
    source = model_arguments.model or teacher_arguments.teacher
    processor = load_image_processor(source) or load_image_processor(None)
    train, val = load_splits(data_arguments, processor)
    model = build_model(model_arguments, train.class_names)
    teacher = teacher_processor = None
    if teacher_arguments.teacher is not None:
        teacher = load_detector(teacher_arguments.teacher, "teacher")
        teacher_processor = load_image_processor(teacher_arguments.teacher)
    if teacher_arguments.inherit_from_teacher:
        inherit_from_teacher(
            model,
            teacher,
            teacher_arguments.inherit_from_teacher,
            class_index_by_name(teacher.config, train.class_names),
            spread_layers(teacher.config.decoder_layers, model.config.decoder_layers, training_arguments.layer_map),
        )
    trainer = D3etrTrainer(
        model=model,
        args=training_arguments,
        teacher=teacher,
        teacher_processing_class=teacher_processor,
        train_dataset=train,
        eval_dataset=val,
        processing_class=processor,
    )
    stopwatch = Stopwatch(output)
    trainer.add_callback(stopwatch)
    if trainer.is_world_process_zero():
        # only now: a call that failed on its data or its teacher leaves the folder free for the next
        (output / CONFIGURATION).write_text(configuration)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    results = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    results |= {
        "parameters": sum(parameter.numel() for parameter in model.to_stock().parameters()),
        "steps": trainer.state.global_step,
        "seconds": stopwatch.seconds,
    }
    if trainer.is_world_process_zero():
        write_json(output / HISTORY, trainer.state.log_history)
        write_json(output / RESULTS, results)
    return results


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
    detector = load_detector(model)
    processor = load_image_processor(model) or load_image_processor(None)
    _, val = load_splits(data_arguments, processor)
    if val.class_names != class_names_of(detector.config):
        # a teacher with more classes, or the same in another order: its head is reduced to the data's, by name
        keep_classes(detector, class_index_by_name(detector.config, val.class_names), val.class_names)
    trainer = D3etrTrainer(model=detector, args=training_arguments, eval_dataset=val, processing_class=processor)
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    metrics = {name: value for name, value in metrics.items() if name.startswith(("AP", "AR"))}
    if trainer.is_world_process_zero():
        (Path(output_dir) / "evaluation.json").write_text(json.dumps(metrics, indent=1))
    return metrics


# what the user can put right: shown by the scripts without a traceback
USER_ERRORS = (
    DatasetError,
    IncompatibleDataError,
    IncompatibleTeacherError,
    DetectorLoadError,
    OutputFolderError,
    NonFiniteLossError,
)


class Stopwatch(TrainerCallback):
    """Seconds spent on training steps and waiting for their data; evaluation and saving do not count.

    Kept in the output folder at every save, so that an interrupted run knows what it spent.
    """

    def __init__(self, output: Path):
        self.file = output / SECONDS
        self.seconds = json.loads(self.file.read_text()) if self.file.exists() else 0.0
        self.mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.file, self.seconds)
        self.mark = time.perf_counter()


def write_json(path: Path, content) -> None:
    """Write a file whole or not at all: a run may be stopped at any moment."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.replace(path)


def describe_run(*instances) -> str:
    """The YAML that makes the scripts build these dataclasses again."""
    with tempfile.TemporaryDirectory() as folder:
        write_configuration(Path(folder) / CONFIGURATION, *instances)
        return (Path(folder) / CONFIGURATION).read_text()


def check_output_folder(output: Path, configuration: str) -> str | None:
    """Make sure an output folder is this run's, or free, and find where to go on from.

    Args:
        output: the folder, which need not exist.
        configuration: of the run, from `describe_run`; where its folder lies does not count.

    Returns:
        The last complete checkpoint, or None to start from the beginning.

    Raises:
        OutputFolderError: the folder holds another run, or files but no run.
    """
    if not output.exists() or not any(output.iterdir()):
        return None
    if not (output / CONFIGURATION).exists():
        raise OutputFolderError(
            f"{output} is not empty and holds no {CONFIGURATION} of a run: choose another output_dir, or empty it"
        )
    old, new = (
        yaml.load(text, Loader=ConfigurationLoader) or {}
        for text in ((output / CONFIGURATION).read_text(), configuration)
    )
    keys = sorted((old.keys() | new.keys()) - {"output_dir"})
    changed = [key for key in keys if old.get(key) != new.get(key)]
    if changed:
        raise OutputFolderError(
            f"{output} holds another run: it differs in "
            + ", ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} here)" for key in changed[:3])
            + "; choose another output_dir, or remove the folder"
        )
    return last_complete_checkpoint(output)


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint folder whose trainer state, which is written last, can be read."""
    folders = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            logger.warning(f"{folder} is incomplete (the run stopped while saving it) and is passed over")
            continue
        return str(folder)
    return None
