"""One training run in one output folder: guarded, resumable, with its results beside its model."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from d3etr_hf.cli.signals import saying_what_is_kept, stopping_at_signals
from d3etr_hf.data import DataArguments, check_places, load_splits, with_side_divisor
from d3etr_hf.errors import DatasetError
from d3etr_hf.files import write_json, write_whole
from d3etr_hf.models.image_processors import image_processor_of, load_image_processor
from d3etr_hf.models.loading import (
    ModelArguments,
    TeacherArguments,
    build_model,
    check_teacher,
    inherit_from_teacher,
    load_teacher,
    model_type_of,
    read_model_options,
)
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.publishing.licenses import require_license
from d3etr_hf.publishing.publish import resume_command
from d3etr_hf.publishing.run_folder import PICTURES, links_to_hub, restore_weights
from d3etr_hf.runs.description import describe_run
from d3etr_hf.runs.environment import describe_environment
from d3etr_hf.runs.folder_lock import holding
from d3etr_hf.runs.inputs import check_inputs, inputs_of, read_inputs
from d3etr_hf.runs.longer_run import refuse_stopped_early, refuse_without_checkpoint
from d3etr_hf.runs.output_folder import (
    CONFIGURATION,
    ENVIRONMENT,
    HISTORY,
    INPUTS,
    LAUNCH,
    RESULTS,
    check_output_folder,
    checkpoint_to_go_on_from,
    describe_launch,
    read_record,
    refuse_split_launch,
    refuse_to_resume_finished,
)
from d3etr_hf.runs.stopwatch import Stopwatch
from d3etr_hf.training.checks import check_best_metric
from d3etr_hf.training.heartbeat import watching_processes
from d3etr_hf.training.processes import on_main_process
from d3etr_hf.training.step_probe import StepProbe
from d3etr_hf.training.stopping import launcher
from d3etr_hf.training.teacher import class_index_by_name, spread_layers
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.unlabeled import check_unlabeled_option
from d3etr_hf.visualization.curves_while_running import CurvesWhileRunning

logger = logging.get_logger(__name__)

NO_CARD_ARGUMENTS = CardArguments()


def train_detector(
    model_arguments: ModelArguments,
    teacher_arguments: TeacherArguments,
    data_arguments: DataArguments,
    training_arguments: D3etrTrainingArguments,
    card_arguments: CardArguments = NO_CARD_ARGUMENTS,
) -> dict:
    """Train, evaluate, save and publish one detector; go on where an interrupted run of the same options stopped.

    A run that goes on ends as if nothing had stopped it.

    Returns:
        The results, as written to `results.json`: AP and AP50 (0..1) and all other metrics, parameters, optimizer
        steps, and `Stopwatch.spent` on training (summed over interruptions; without evaluation before or after it).

    Raises:
        OutputFolderError: the output folder holds another run, or files that are no run, or what the run reads has
            changed since it began.
        FolderInUseError, BatchSizeError: another call is at work in it; a batch does not fit in memory.
        CheckpointError: there is no whole checkpoint left to go on from, or the one that was asked for is not whole.
        DamagedFileError, WriteError: a file of the folder cannot be read, or written.
        HubError: the upload failed; the results are saved.
        TrainingStopped: SIGTERM or Ctrl-C came while it trained.
    """
    launcher()
    refuse_split_launch(training_arguments)
    check_best_metric(training_arguments)
    check_unlabeled_option(data_arguments.unlabeled_images, training_arguments, teacher_arguments.teacher)
    output = Path(training_arguments.output_dir)
    # with the model's options themselves: a path would not tell that the file has changed
    described = replace(model_arguments, model_config=read_model_options(model_arguments))
    configuration = describe_run(described, teacher_arguments, data_arguments, training_arguments)
    launch = describe_launch(training_arguments)
    with ExitStack() as held, watching_processes(training_arguments.ddp_timeout), saying_what_is_kept(output):
        results, checkpoint = on_main_process(
            lambda: begin(held, configuration, launch, training_arguments, card_arguments)
        )
        if results is not None:
            return results
        stopwatch = Stopwatch(output, training_arguments.device.type == "cpu")
        trainer = build_trainer(model_arguments, teacher_arguments, data_arguments, training_arguments)
        trainer.add_callback(stopwatch)
        trainer.add_callback(CurvesWhileRunning(output, HISTORY))
        inputs = inputs_compared(trainer, checkpoint, model_arguments, teacher_arguments, data_arguments)
        # only now: a call that failed on its data or its teacher leaves the folder free for the next
        on_main_process(lambda: write_description(output, configuration, launch, inputs))
        on_main_process(lambda: write_environment(output, model_arguments, teacher_arguments, data_arguments))
        with stopping_at_signals(trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
        return finish(trainer, stopwatch.spent, card_arguments)


def begin(
    held: ExitStack,
    configuration: str,
    launch: dict,
    training_arguments: D3etrTrainingArguments,
    card_arguments: CardArguments,
) -> tuple[dict | None, str | None]:
    """Take an output folder for this run, until `held` is closed.

    Returns:
        The results, where the run is finished already, and the checkpoint to go on from, None for the beginning.
    """
    output = Path(training_arguments.output_dir)
    longer = check_output_folder(output, configuration, launch)
    if (output / RESULTS).exists() and not longer:
        refuse_to_resume_finished(output, training_arguments)
        return finished_results(output, training_arguments, card_arguments), None
    if training_arguments.push_to_hub:
        card_arguments.check_places()
        if card_arguments.license is None:
            require_license(output, {})
    held.enter_context(holding(output, "another training run"))
    check_output_folder(output, configuration, launch)  # another call may have come in between
    checkpoint = checkpoint_to_go_on_from(output, training_arguments)
    if (output / RESULTS).exists():
        refuse_without_checkpoint(output, checkpoint)
    if longer and (output / HISTORY).exists():
        refuse_stopped_early(output, read_record(output / HISTORY), training_arguments)
    return None, checkpoint


def inputs_compared(
    trainer: D3etrTrainer,
    checkpoint: str | None,
    model_arguments: ModelArguments,
    teacher_arguments: TeacherArguments,
    data_arguments: DataArguments,
) -> dict:
    """What the run reads; where it goes on from a checkpoint, that is what it read before.

    Raises:
        OutputFolderError: it is not.
    """

    def compare() -> dict:
        known = {} if checkpoint is None else read_inputs(Path(trainer.args.output_dir))
        try:
            read = inputs_of(model_arguments, teacher_arguments, trainer.train_dataset, trainer.eval_dataset)
            return check_inputs(read, known, data_arguments.hash_images)
        except OSError as error:
            raise DatasetError(f"{error.filename}: cannot be read ({error.strerror}): check the path.") from error

    return on_main_process(compare)


def write_description(output: Path, configuration: str, launch: dict, inputs: dict) -> None:
    """Write down what a run is, so that a later call can tell whether it is the same.

    A run that was finished and goes on has no results any more, nor pictures of what it found.
    """
    for name in (RESULTS, *PICTURES):
        (output / name).unlink(missing_ok=True)
    write_whole(output / CONFIGURATION, configuration)
    write_json(output / LAUNCH, launch)
    write_json(output / INPUTS, inputs)


def write_environment(
    output: Path, model_arguments: ModelArguments, teacher_arguments: TeacherArguments, data_arguments: DataArguments
) -> None:
    """Write down where a run takes place, and what of it came from the Hub."""
    links = links_to_hub(
        teacher=teacher_arguments.teacher,
        dataset=data_arguments.dataset_name,
        started_from=model_arguments.model,
    )
    write_json(output / ENVIRONMENT, describe_environment() | {"links": links})


def finished_results(output: Path, training_arguments: D3etrTrainingArguments, card_arguments: CardArguments) -> dict:
    """The results of a run that is finished already, which is said, with how to publish it if asked for.

    Raises:
        OutputFolderError: its model is missing or damaged, and cannot be restored.
    """
    results = read_record(output / RESULTS)
    restore_weights(output, results.get("weights"))
    repo_id = training_arguments.hub_model_id or output.resolve().name
    private, revision = training_arguments.hub_private_repo, training_arguments.hub_revision
    publish = resume_command(output, repo_id, card_arguments, private, revision)
    hint = f"; to publish it:\n{publish}" if training_arguments.push_to_hub else ""
    logger.warning(f"{output} holds this run already, finished: nothing to do{hint}")
    return results


def build_trainer(
    model_arguments: ModelArguments,
    teacher_arguments: TeacherArguments,
    data_arguments: DataArguments,
    training_arguments: D3etrTrainingArguments,
) -> D3etrTrainer:
    """The trainer of a run from its seed on: data, student, teacher, and what the student inherits."""
    set_seed(training_arguments.seed)
    check_places(data_arguments)  # before anything is loaded
    teacher_type = None if teacher_arguments.teacher is None else check_teacher(teacher_arguments.teacher)
    model_type = model_type_of(model_arguments)
    if model_arguments.model is not None:
        processor = image_processor_of(model_type, model_arguments.model)
    else:
        processor = image_processor_of(model_type, teacher_arguments.teacher, source_type=teacher_type)
    teacher = teacher_processor = None
    if teacher_arguments.teacher is not None:
        teacher_processor = load_image_processor(teacher_arguments.teacher)
    sees_images = training_arguments.distillation.needs_teacher
    taught = teacher_processor if sees_images else None
    train, val = load_splits(data_arguments, processor, taught, decide=on_main_process)
    model = build_model(model_arguments, train.class_names)
    reads_teacher = sees_images or teacher_arguments.inherit_from_teacher
    if teacher_arguments.teacher and not reads_teacher:
        logger.warning(f"the teacher {teacher_arguments.teacher!r} is not used: these options need none")
    if teacher_arguments.teacher is not None:
        teacher = load_teacher(teacher_arguments.teacher)
    of_teacher = teacher.side_divisor if teacher is not None and sees_images else 1
    train = with_side_divisor(train, data_arguments, model.side_divisor, of_teacher)
    if teacher is not None and teacher_arguments.inherit_from_teacher:
        inherit_from_teacher(
            model,
            teacher,
            teacher_arguments.inherit_from_teacher,
            class_index_by_name(teacher, train.class_names),
            spread_layers(teacher.decoder_depth, model.decoder_depth, training_arguments.layer_map),
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
    trainer.add_callback(StepProbe(trainer))
    announce(trainer)
    return trainer


def announce(trainer: D3etrTrainer) -> None:
    """Say who learns, and from whom."""
    trained = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
    frozen = [parameter.numel() for parameter in trainer.model.parameters() if not parameter.requires_grad]
    logger.info(
        f"trained: {trainer.model.title}, {sum(trained):,} parameters in {len(trained)} tensors, and {sum(frozen):,} "
        f"in {len(frozen)} that stay as they are"
    )
    if trainer.teacher is not None:
        teacher = trainer.teacher.detector
        count = sum(parameter.numel() for parameter in teacher.parameters())
        logger.info(
            f"teacher: {teacher.title}, {count:,} parameters, from {trainer.teacher.name}; it teaches and stays as it "
            "is"
        )


def finish(trainer: D3etrTrainer, spent: Mapping[str, float], card_arguments: CardArguments) -> dict:
    """Evaluate, save, record and, if asked for, publish what a trainer has trained in a time; the results."""
    metrics = trainer.evaluate()
    # not `save_model()`, which pushes: the Hub may fail, and all that was found out must be on disk by then
    trainer.save_without_pushing()
    results = trainer.record_results(metrics, spent)
    report(results, trainer.args)
    if trainer.args.push_to_hub:
        address = trainer.push_to_hub(**card_arguments.for_trainer())
        if trainer.is_world_process_zero():
            print(f"published: {address}")
    return results


def report(results: dict, training_arguments: TrainingArguments) -> None:
    """Say on the main process what a run came to."""
    if training_arguments.process_index == 0:
        scores = [f"{name} {results[name]:.3f}" for name in ("AP", "AP50") if name in results]
        print(f"{training_arguments.output_dir}: {', '.join(scores) or 'no AP: the validation split has no object'}")
