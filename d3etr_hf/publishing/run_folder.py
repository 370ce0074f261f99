"""A finished run as publishing sees it: its models, its data, and what it recorded about itself."""

import csv
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from d3etr_hf.data import DataArguments, DetectionDataset, DetectionTransform, load_splits
from d3etr_hf.errors import OutputFolderError, PublishError, quoted
from d3etr_hf.files import copy_whole, sha256_of
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import image_processor_of, load_image_processor
from d3etr_hf.models.loading import load_detector, load_teacher
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.runs.output_folder import (
    CONFIGURATION,
    ENVIRONMENT,
    HISTORY,
    LAUNCH,
    RESULTS,
    read_record,
    read_run_options,
)
from d3etr_hf.training.checkpoints import checkpoints_of, unreadable
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.instability import logged_instability
from d3etr_hf.training.training_arguments import (
    DISTILLATION_OPTIONS,
    RENAMED_OPTIONS,
    D3etrTrainingArguments,
    fields_of,
)

logger = logging.get_logger(__name__)

EMISSIONS = "emissions.csv"
PLACES = {"data_folder", "dataset_name", "train_annotations", "train_images", "val_annotations", "val_images"}
SPLITS = {"dataset_train_split", "dataset_val_split", "validation_fraction"}
CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# what is read with the weights
CONFIGURATIONS = (CONFIG, WEIGHTS_INDEX, "preprocessor_config.json")
# COCO's limits of small and medium objects, square pixels
SIZE_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
NO_TEACHER = "none"
PICTURES = ("detections.png", "attention.png", "curves.png", "instability.png")
# what a card tells, whether it was set or left at its default
TOLD_OPTIONS = (*DISTILLATION_OPTIONS, "detection_weight")


@dataclass
class PublishedRun:
    """Everything that a card is measured from.

    Attributes:
        folder: the output folder of the run.
        student: what was trained.
        train, val: the splits, with the student's transforms.
        teacher, teacher_name, teacher_processor: the teacher, its folder or Hub id and its image processor; None
            without one.
        data_moved: whether these data were named anew, so that the run's own results may be of others.
    """

    folder: Path
    student: Detector
    train: DetectionDataset
    val: DetectionDataset
    teacher: Detector | OtherDetector | None = None
    teacher_name: str | None = None
    teacher_processor: BaseImageProcessor | None = None
    data_moved: bool = False

    @property
    def teacher_val(self) -> DetectionDataset:
        """The validation split as the teacher's own image processor scales it (the student's where it has none)."""
        if self.teacher_processor is None:
            return self.val
        return self.val.with_transform(DetectionTransform(self.teacher_processor))

    @property
    def taught_at(self) -> list[int]:
        """Height and width, in pixels, at which the teacher sees the first validation image in distillation."""
        transform = self.train.transform
        own = transform.teacher_processor if isinstance(transform, DetectionTransform) else None
        val = self.val if own is None else self.val.with_transform(DetectionTransform(own))
        return list(val[0]["pixel_values"].shape[1:])

    @property
    def models(self) -> dict[str, tuple[Detector, DetectionDataset]]:
        """The teacher and the student, or `model` alone, as pictures call them; with validation as each sees it."""
        if self.teacher is None:
            return {"model": (self.student, self.val)}
        return {"teacher": (self.teacher, self.teacher_val), "student": (self.student, self.val)}

    def record(self, name: str):
        """What the run wrote into one of its JSON files; None where it has not."""
        return read_json(self.folder / name)


def is_hub_id(name: str) -> bool:
    """Whether a name could be an address on the Hub: `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def read_json(path: Path):
    """A JSON file's content, or None where there is none; see `read_record`."""
    return read_record(path) if path.exists() else None


def read_configuration(folder: Path) -> dict:
    """The values that the run's `run.yaml` sets.

    Raises:
        PublishError: there is none, the run is not finished, or it has options of an earlier version.
        DamagedFileError: it cannot be read.
    """
    for name in (CONFIGURATION, RESULTS):
        if not (folder / name).exists():
            raise PublishError(
                f"{folder} holds no {name}, so it is no finished run of `d3etr distill` or `d3etr train`: "
                "finish the run with the same command, or publish from Python by `trainer.push_to_hub()`"
            )
    configuration = read_run_options(folder / CONFIGURATION)
    if old := [name for name in RENAMED_OPTIONS if name in configuration]:
        renamed = ", ".join(f"{name} is now {RENAMED_OPTIONS[name]}" for name in old)
        raise PublishError(
            f"{folder / CONFIGURATION} has options of an earlier version: {renamed}; rename them in it, and try again"
        )
    return configuration


def hash_of_weights(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights file, or of its index and shards one after the other.

    Raises:
        PublishError: there is none.
    """
    paths = [folder / WEIGHTS]
    if not paths[0].exists():
        paths = [folder / WEIGHTS_INDEX, *shards_of(folder)]
    if not paths[0].exists():
        raise PublishError(f"{folder} holds no {WEIGHTS}: let the run end, or call `trainer.save_model()`, first")
    return sha256_of(*paths)


def shards_of(folder: Path) -> list[Path]:
    """The files of a checkpoint whose weights are in several."""
    return sorted(folder.glob("model-*-of-*.safetensors"))


def restore_weights(folder: Path, recorded: str | None) -> None:
    """Make sure that a finished run's model is there, and bring it back from the checkpoint that holds the same.

    Args:
        folder: of the run.
        recorded: hash of the weights that the run's results were measured on; None in results of earlier versions.

    Raises:
        OutputFolderError: the model is missing or damaged and no checkpoint holds it, or the weights are others.
    """
    reason = _why_no_model(folder)
    if reason is None and recorded in (None, hash_of_weights(folder)):
        return
    if reason is None:
        raise OutputFolderError(
            f"{folder} holds other weights than its {RESULTS} was measured on: move {WEIGHTS} away to have the run's "
            f"own restored from a checkpoint, or remove {RESULTS} to go on from the last"
        )
    for checkpoint in checkpoints_of(folder):
        if _why_no_model(checkpoint) is None and recorded in (None, hash_of_weights(checkpoint)):
            names = [path.name for path in checkpoint.glob("*.json") if path.name in CONFIGURATIONS]
            names += [path.name for path in (checkpoint / WEIGHTS, *shards_of(checkpoint)) if path.exists()]
            for name in names:
                copy_whole(checkpoint / name, folder / name)
            logger.warning(f"{folder} {reason}: its model was restored from {checkpoint}")
            return
    raise OutputFolderError(
        f"{folder} holds the results of a finished run, but {reason}, and no checkpoint in it has the same weights: "
        f"remove {folder / RESULTS} and call again to go on from the last checkpoint, or else from the beginning"
    )


def _why_no_model(folder: Path) -> str | None:
    """What keeps the model in a folder from being loaded, in a few words; None if nothing does."""
    if not (folder / CONFIG).is_file():
        return f"holds no {CONFIG}"
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            names = {*json.loads((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"holds a damaged {WEIGHTS_INDEX}"
    else:
        names = {WEIGHTS}
    for name in sorted(names):
        if not (folder / name).is_file():
            return f"holds no {name}"
        if reason := unreadable(folder / name):
            return f"holds a {name} that {reason}"
    return None


def merged_data_arguments(configuration: dict, given: DataArguments) -> DataArguments:
    """The run's own data arguments with those that were given in their place; one new place replaces all old ones.

    With the old places goes what was evaluated on there: splits by name, and a held out share.

    Raises:
        PublishError: those that were given do not go with the run's own.
    """
    changed = {field.name: value for field in fields(given) if (value := getattr(given, field.name)) != field.default}
    own = {field.name: configuration[field.name] for field in fields(given) if field.name in configuration}
    if PLACES & changed.keys():
        own = {name: value for name, value in own.items() if name not in PLACES | SPLITS}
    try:
        return DataArguments(**(own | changed))
    except ValueError as error:
        shown = ", ".join(f"{name} {quoted(value)}" for name, value in changed.items()) or "none were given"
        raise PublishError(
            f"the data options given here ({shown}) cannot be used with those of the run: {error} Name a place of the "
            "data as well (data_folder, dataset_name or the explicit paths), which replaces the run's splits"
        ) from error


def load_run(folder: Path, data_arguments: DataArguments | None = None, teacher: str | None = None) -> PublishedRun:
    """Load a finished run's models and data from its output folder.

    Args:
        folder: the output folder.
        data_arguments: where the data are now; by default where the run had them.
        teacher: where the teacher is now; by default where the run had it, and "none" leaves it out of the card.

    Raises:
        PublishError, DetectorLoadError, DatasetError: the run, a model or the data cannot be read.
    """
    configuration = read_configuration(folder)
    moved = data_arguments is not None
    data_arguments = merged_data_arguments(configuration, data_arguments or DataArguments())
    student = load_detector(str(folder), "student")
    processor = image_processor_of(student.config.model_type, str(folder))
    teacher = teacher or configuration.get("teacher")
    # of training images only boxes are counted, of those that were not left out, and which have none
    trains = data_arguments.skip_broken_images or data_arguments.unlabeled_images is not None
    if teacher is None or teacher == NO_TEACHER:
        splits = load_splits(data_arguments, processor, trains=trains)
        return PublishedRun(folder, student, *splits, data_moved=moved)
    model, teacher_processor = load_teacher(teacher), load_image_processor(teacher)
    train, val = load_splits(data_arguments, processor, teacher_processor, trains=trains)
    return PublishedRun(folder, student, train, val, model, teacher, teacher_processor, moved)


def describe_data(train: DetectionDataset, val: DetectionDataset) -> dict:
    """Names, numbers of images and objects, boxes of each class, and of each of COCO's sizes in validation.

    With `unlabeled`, name, number and ratio of images without labels, where there are any.
    """
    described = {}
    for split, dataset in (("train", train), ("val", val)):
        labels = Counter(label for labels in dataset.rows["class_labels"] for label in labels)
        described[split] = {
            "name": dataset.name,
            "images": len(dataset),
            "objects": sum(labels.values()),
            "classes": {name: labels[label] for label, name in enumerate(dataset.class_names)},
        }
    if train.unlabeled is not None:
        images = train.unlabeled.images
        described["unlabeled"] = {"name": images.name, "images": len(images), "ratio": train.unlabeled.ratio}
    areas = [
        annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
        for annotation in val.ground_truth["annotations"]
        if not annotation.get("iscrowd", 0)
    ]
    sizes = Counter(next(name for name, limit in SIZE_LIMITS.items() if area < limit) for area in areas)
    described["val"]["sizes"] = {name: sizes[name] for name in SIZE_LIMITS}
    return described


def describe_training(run: PublishedRun, configuration: dict) -> dict:
    """How the student was trained: what its folder recorded, and the options in force."""
    fields_of_arguments = D3etrTrainingArguments.__dataclass_fields__

    def value_of(name: str):
        return configuration.get(name, fields_of_arguments[name].default)

    options = {name: value_of(name) for name in TOLD_OPTIONS}
    if run.teacher is not None and run.teacher.predictions_only:
        asked = Distillation(**{name: options[name] for name in fields_of(Distillation)})
        options |= asdict(asked.of_predictions())
    results, launch = run.record(RESULTS), run.record(LAUNCH) or {}
    per_device = value_of("per_device_train_batch_size")
    accumulated, processes = value_of("gradient_accumulation_steps"), launch.get("processes", 1)
    training = {
        "steps": results["steps"],
        "epochs": results.get("epoch"),
        "seconds": results.get("seconds"),
        "seed": value_of("seed"),
        "batch_size": per_device * accumulated * processes,
        "batch": {"per_device": per_device, "accumulated": accumulated, "processes": processes},
        "precision": {"no": "float32"}.get(launch.get("mixed_precision"), launch.get("mixed_precision")),
        "options": options,
        "inherited": configuration.get("inherit_from_teacher", []),
        "started_from": configuration.get("model"),
        "environment": run.record(ENVIRONMENT),
        "energy": read_energy(run.folder / EMISSIONS),
        "instability": first_and_last(logged_instability(run.record(HISTORY) or [])) or None,
    }
    return {name: value for name, value in training.items() if value is not None}


def first_and_last(instability: dict[str, dict[int, list[tuple[int, float]]]]) -> dict[str, dict[str, list]]:
    """By kind the first and the last share that was logged, each the mean of the decoder layers, and their steps.

    Args:
        instability: from `logged_instability`; the layers of a kind are logged together.
    """
    return {
        kind: {
            "steps": [next(iter(layers.values()))[place][0] for place in (0, -1)],
            "shares": [fmean(points[place][1] for points in layers.values()) for place in (0, -1)],
        }
        for kind, layers in instability.items()
    }


def links_to_hub(**names: str | None) -> dict[str, str]:
    """Those of the names (`teacher`, `dataset`, `started_from`) that were loaded from the Hub.

    To be asked while they are loaded: later a folder may be gone, and its name look like an id.
    """
    return {role: name for role, name in names.items() if name and is_hub_id(name) and not Path(name).exists()}


def remove_pictures(folder: Path) -> None:
    """Take away what was drawn of other weights, or of another teacher."""
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)


def read_energy(path: Path) -> dict | None:
    """Kilowatt hours and kilograms of CO2 that codecarbon measured, over all interruptions; None without its file."""
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "kilowatt_hours": sum(float(row["energy_consumed"]) for row in rows),
        "kilograms_of_co2": sum(float(row["emissions"]) for row in rows),
    }
