"""The model card: a Jinja template filled with what was measured, and metadata that the Hub parses back."""

import hashlib
import html
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from d3etr_hf.configurations import option, write_yaml
from d3etr_hf.errors import PublishError
from d3etr_hf.files import write_whole
from d3etr_hf.models.timm_names import read_config
from d3etr_hf.publishing import card_texts
from d3etr_hf.publishing.citations import citations_for
from d3etr_hf.publishing.onnx_check import CHECK as ONNX_CHECK
from d3etr_hf.publishing.onnx_check import MODEL as ONNX_MODEL
from d3etr_hf.publishing.onnx_check import check_in_words, onnx_snippet
from d3etr_hf.publishing.privacy import anonymise_configuration
from d3etr_hf.publishing.run_folder import PICTURES, is_hub_id, read_configuration, read_json

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
CARD, TRAINING = "README.md", "training.yaml"
MOST_CLASSES_UNFOLDED = 12
# the Hub knows these relations: adapter, merge, quantized, finetune
RELATION = "finetune"
RESERVED_TITLES = ("teacher", "student", "this student")


@dataclass
class CardArguments:
    """What a card tells that no measurement knows."""

    license: str | None = option(None, "The Hub's identifier of the model's licence, for example apache-2.0.")
    teacher_id: str | None = option(None, "Hub id to link the teacher to, where it was trained from a local folder.")
    dataset_id: str | None = option(None, "Hub id to link the data set to, where it was read from a local folder.")
    compare: list[str] = option(
        [], "Further detectors for the results table, each as 'title=folder', such as 'student alone=runs/alone'."
    )

    def __post_init__(self):
        for name in ("teacher_id", "dataset_id"):
            value = getattr(self, name)
            if value is not None and not is_hub_id(value):
                raise ValueError(f"{name}={value!r} is no Hub id: give owner/name")
        for entry in self.compare:
            if not all(part.strip() for part in entry.rpartition("=")):
                raise ValueError(f"compare: {entry!r} must be 'title=folder', such as 'student alone=runs/alone'")
        titles = [entry.rpartition("=")[0].strip() for entry in self.compare]
        for title in titles:
            if titles.count(title) > 1 or title.casefold() in RESERVED_TITLES:
                raise ValueError(f"compare: the title {title!r} is given twice, or is the teacher's or student's own")

    def for_trainer(self) -> dict:
        """The same as arguments of `D3etrTrainer.push_to_hub`, which are named as in Transformers."""
        return {
            "license": self.license,
            "finetuned_from": self.teacher_id,
            "dataset": self.dataset_id,
            "compare": self.compare,
        }

    def check_places(self) -> None:
        """Before hours are spent: whether what is to be compared is there.

        Raises:
            PublishError: there is no model at one of the places.
        """
        for title, path in self.compared().items():
            try:
                read_config(path, repr(path))
            except (OSError, ValueError) as error:
                raise PublishError(f"compare: {title}={path}: no model could be found there ({error})") from error

    def compared(self) -> dict[str, str]:
        """Title → folder."""
        return {title.strip(): path.strip() for title, _, path in (entry.rpartition("=") for entry in self.compare)}


def write_card(folder: Path, metrics: dict, arguments: CardArguments, repo_id: str | None = None) -> Path:
    """Write `README.md` and the `training.yaml` that reproduces the run; the same input gives the same bytes.

    Args:
        folder: of the run, with its pictures.
        metrics: from `measure_run`.
        arguments: licence and links.
        repo_id: where it will be published: its code examples then load it from there, else from its folder.

    Returns:
        The path of the card.

    Raises:
        PublishError: the Hub's client does not accept the metadata.
    """
    configuration = read_configuration(folder)
    training = publishable_configuration(configuration)
    write_whole(folder / TRAINING, training)
    title = repo_id.split("/")[-1] if repo_id else metrics["name"]
    try:
        data = card_data(metrics, arguments, title)
    except ValueError as error:
        raise PublishError(f"{folder}: the card's metadata are not valid: {error}") from error
    texts = _texts(metrics, arguments, repo_id, check_of_onnx(folder, metrics["weights"]))
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        model_id=repo_id or ".",
        pictures=pictures_of(folder, metrics),
        configuration=training.rstrip(),
        reproduces=of_script(configuration),
        **texts,
    )
    path = folder / CARD
    card.save(path)
    return path


def _texts(metrics: dict, arguments: CardArguments, repo_id: str | None, onnx_check: dict | None) -> dict:
    """What the template takes that follows from the figures alone."""
    validation = metrics["data"]["val"]
    return {
        "summary": summary(metrics, arguments),
        "highlights": card_texts.highlights(metrics),
        "evaluated_on": f"On the {validation['images']:,} images of {validation['name']}.",
        "results_table": card_texts.results_table(metrics),
        "class_table": card_texts.class_table(metrics),
        "folded": len(validation["classes"]) > MOST_CLASSES_UNFOLDED,
        "cost_table": card_texts.cost_table(metrics),
        "cost_note": card_texts.cost_note(metrics),
        "data_table": card_texts.data_table(metrics["data"]),
        "training_table": card_texts.training_table(metrics["training"]),
        "option_table": card_texts.option_table(metrics["training"]) if is_distilled(metrics) else None,
        "needs_timm": metrics["student"]["backbone"] == "timm_backbone",
        "limitations": card_texts.limitations(metrics),
        "versions": card_texts.versions(metrics),
        "citation_note": "Please cite the method and what it builds on.",
        "citations": "\n\n".join(citations_for(metrics)),
        "onnx_snippet": onnx_snippet(repo_id).rstrip() if onnx_check else None,
        "onnx_check": check_in_words(onnx_check) if onnx_check else None,
        "onnx_images": onnx_check["takes"] if onnx_check else None,
    }


def check_of_onnx(folder: Path, weights: str) -> dict | None:
    """What `d3etr export` found out about the folder's ONNX file; None without one.

    Raises:
        PublishError: the file is unchecked, or was exported from other weights than are published beside it.
    """
    if not (folder / ONNX_MODEL).exists():
        return None
    check = read_json(folder / ONNX_CHECK)
    content = hashlib.sha256((folder / ONNX_MODEL).read_bytes()).hexdigest()
    if check is None or (check.get("weights"), check.get("onnx")) != (weights, content):
        raise PublishError(
            f"{folder / ONNX_MODEL} was not exported from these weights by `d3etr export`: export it again, or "
            "remove it"
        )
    return check


def card_data(metrics: dict, arguments: CardArguments, name: str) -> ModelCardData:
    """The metadata at the top of a card, with one `model-index` entry for every COCO metric."""
    validation, links = metrics["data"]["val"], links_of(metrics, arguments)
    tags = ["object-detection", metrics["student"]["family"]["tag"]]
    if is_distilled(metrics):
        tags += ["knowledge-distillation", "d3etr"]
    learned = is_distilled(metrics) or metrics["training"]["inherited"]
    base_model = (links.get("teacher") if learned else None) or links.get("started_from")
    more = {"base_model_relation": RELATION} if base_model else {}
    if "energy" in metrics["training"]:
        grams = 1000 * metrics["training"]["energy"]["kilograms_of_co2"]
        kind = "fine-tuning" if "started_from" in metrics["training"] else "pre-training"
        more["co2_eq_emissions"] = {"emissions": grams, "source": "codecarbon", "training_type": kind}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=arguments.license,
        tags=tags,
        datasets=[links["dataset"]] if "dataset" in links else None,
        base_model=base_model,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="object-detection",
                task_name="Object Detection",
                dataset_type=links.get("dataset", validation["name"]),
                dataset_name=validation["name"],
                metric_type=key,
                metric_name=f"COCO {key}",
                # a number of numpy's would become a binary YAML tag
                metric_value=float(value),
            )
            for key, value in metrics["student"]["metrics"].items()
        ],
        **more,
    )


def links_of(metrics: dict, arguments: CardArguments) -> dict[str, str]:
    """Hub ids of `teacher`, `dataset` and `started_from`, given, or because the run loaded them from there."""
    given = {"teacher": arguments.teacher_id, "dataset": arguments.dataset_id}
    return metrics["links"] | {name: value for name, value in given.items() if value is not None}


def is_distilled(metrics: dict) -> bool:
    """Whether the run learned from a teacher's outputs."""
    return bool(card_texts.learned_parts(metrics["training"]["options"]))


def summary(metrics: dict, arguments: CardArguments) -> str:
    """What this model is, in two sentences."""
    classes, links = list(metrics["data"]["val"]["classes"]), links_of(metrics, arguments)
    named = f" ({html.escape(', '.join(classes), quote=False)})" if len(classes) <= MOST_CLASSES_UNFOLDED else ""
    family = metrics["student"]["family"]["title"]
    what = f"A {family} object detector for {len(classes)} class{'es' if len(classes) > 1 else ''}{named}"
    if "teacher" in metrics and is_distilled(metrics):
        teacher = linked(links.get("teacher"), metrics["teacher"]["name"])
        of_teacher = metrics["teacher"]["family"]["title"]
        teacher += f", a {of_teacher}," if of_teacher != family else ""
        *parts, last = card_texts.learned_parts(metrics["training"]["options"])
        in_words = f"{', '.join(parts)} and {last}" if parts else last
        what += (
            f", distilled from the teacher {teacher} by D³ETR (decoder distillation: MixMatcher pairs the object "
            f"queries of both, and the student learns the teacher's {in_words})"
        )
    data = linked(links.get("dataset"), metrics["data"]["train"]["name"], "datasets/")
    return f"{what}. Trained on {data} with [Transformers](https://github.com/huggingface/transformers) and d3etr_hf."


def linked(hub_id: str | None, name: str, kind: str = "") -> str:
    """A link to the Hub where there is an address, else the name alone."""
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else f"`{name}`"


def pictures_of(folder: Path, metrics: dict) -> dict:
    """The pictures that are there; for `detections` the titles of its columns."""
    found = {name.removesuffix(".png"): True for name in PICTURES if (folder / name).exists()}
    if "cross-attention" not in card_texts.learned_parts(metrics["training"]["options"]):
        found.pop("attention", None)  # it is shown as what was transferred
    if "detections" in found:
        teacher = ["teacher"] if "teacher" in metrics else []
        found["detections"] = ["ground truth", *teacher, "student"]
    return found


def publishable_configuration(configuration: dict) -> str:
    """The run's YAML without what publishes it, secrets, and paths outside the working directory."""
    command = "train" if configuration.get("auxiliary_queries") == "none" else "distill"
    use = f"for `d3etr {command}`" if of_script(configuration) else "the training arguments of a run from Python"
    comment = f"# {use}; a path outside the working directory keeps its last part only\n"
    return comment + write_yaml(anonymise_configuration(configuration))


def of_script(configuration: dict) -> bool:
    """Whether a configuration names the model too, as those of the scripts do: it then reproduces the run."""
    return bool({"model", "model_config"} & configuration.keys())
