"""The model card: a Jinja template filled with what was measured, and metadata that the Hub parses back."""

import html
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from d3etr_hf.configurations import option, write_yaml
from d3etr_hf.errors import PublishError
from d3etr_hf.files import write_whole
from d3etr_hf.models.loading import family_of_checkpoint
from d3etr_hf.publishing import card_texts
from d3etr_hf.publishing.citations import citations_for
from d3etr_hf.publishing.licenses import IDENTIFIER, license_in
from d3etr_hf.publishing.onnx_record import checks_of_onnx, onnx_texts
from d3etr_hf.publishing.privacy import anonymise, anonymise_configuration
from d3etr_hf.publishing.run_folder import PICTURES, is_hub_id, read_configuration

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
CARD, TRAINING = "README.md", "training.yaml"
MOST_CLASSES_UNFOLDED = 12
# the Hub knows these relations: adapter, merge, quantized, finetune
RELATION = "finetune"
RESERVED_TITLES = ("teacher", "student", "this student", "model", "this model")
NO_COMPARISON = ["none"]


@dataclass
class CardArguments:
    """What a card tells that no measurement knows."""

    license: str | None = option(None, "The Hub's identifier of the model's licence, for example apache-2.0.")
    teacher_id: str | None = option(None, "Hub id to link the teacher to, where it was trained from a local folder.")
    dataset_id: str | None = option(None, "Hub id to link the data set to, where it was read from a local folder.")
    compare: list[str] = option(
        [],
        "Further detectors for the results table, each as 'title=folder', such as 'student alone=runs/alone'; without "
        "it those that are measured already stay, and 'none' takes them out.",
    )

    def __post_init__(self):
        if self.license is not None and not IDENTIFIER.fullmatch(self.license):
            raise ValueError(
                f"license={self.license!r} is no identifier of the Hub's: lower case, without blanks, such as "
                "apache-2.0, mit, other"
            )
        for name in ("teacher_id", "dataset_id"):
            value = getattr(self, name)
            if value is not None and not is_hub_id(value):
                raise ValueError(f"{name}={value!r} is no Hub id: give owner/name")
        if self.compare == NO_COMPARISON:
            return
        for entry in self.compare:
            if not all(part.strip() for part in entry.rpartition("=")):
                raise ValueError(f"compare: {entry!r} must be 'title=folder', such as 'student alone=runs/alone'")
        titles = [entry.rpartition("=")[0].strip() for entry in self.compare]
        for title in titles:
            if titles.count(title) > 1 or title.casefold() in RESERVED_TITLES:
                raise ValueError(f"compare: the title {title!r} is given twice, or is the teacher's or student's own")
            if anonymise(title) != title:
                raise ValueError(f"compare: the title {title!r} holds a path or a secret, and is published: change it")

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
            DetectorLoadError: there is no detector at one of the places.
        """
        for title, path in (self.compared() or {}).items():
            family_of_checkpoint(path, f"compare: {title!r},")

    def compared(self) -> dict[str, str] | None:
        """Title → folder; None where nothing is said of them."""
        if not self.compare:
            return None
        if self.compare == NO_COMPARISON:
            return {}
        return {title.strip(): path.strip() for title, _, path in (entry.rpartition("=") for entry in self.compare)}


def write_card(folder: Path, metrics: dict, arguments: CardArguments, repo_id: str | None = None) -> Path:
    """Write `README.md` and the `training.yaml` that reproduces the run; the same input gives the same bytes.

    Args:
        folder: of the run, with its pictures.
        metrics: from `measure_run`.
        arguments: licence and links; without a licence that of the card there is stays.
        repo_id: where it will be published: its code examples then load it from there, else from its folder.

    Returns:
        The path of the card.

    Raises:
        PublishError: the Hub's client does not accept the metadata.
    """
    metrics = anonymise(metrics)
    if arguments.license is None:
        arguments = replace(arguments, license=license_in(folder))
    configuration = read_configuration(folder)
    training = publishable_configuration(configuration)
    write_whole(folder / TRAINING, training)
    title = repo_id.split("/")[-1] if repo_id else metrics["name"]
    try:
        data = card_data(metrics, arguments, title)
    except ValueError as error:
        raise PublishError(f"{folder}: the card's metadata are not valid: {error}") from error
    texts = _texts(metrics, arguments, repo_id, checks_of_onnx(folder, metrics["weights"]))
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
    write_whole(path, str(card))
    return path


def _texts(metrics: dict, arguments: CardArguments, repo_id: str | None, onnx_checks: dict[str, dict]) -> dict:
    """What the template takes that follows from the figures alone."""
    validation, threshold = metrics["data"]["val"], card_texts.suggested_threshold(metrics)
    return {
        "summary": summary(metrics, arguments),
        "highlights": card_texts.highlights(metrics),
        "evaluated_on": f"On the {validation['images']:,} images of {validation['name']}.",
        "results_table": card_texts.results_table(metrics),
        "class_table": card_texts.class_table(metrics),
        "threshold_table": card_texts.threshold_table(metrics),
        "threshold": threshold,
        "folded": len(validation["classes"]) > MOST_CLASSES_UNFOLDED,
        "cost_table": card_texts.cost_table(metrics),
        "cost_note": card_texts.cost_note(metrics),
        "data_table": card_texts.data_table(metrics["data"]),
        "instability_note": card_texts.instability_note(metrics["training"]),
        "training_table": card_texts.training_table(metrics["training"]),
        "option_table": card_texts.option_table(metrics["training"]) if is_distilled(metrics) else None,
        "needs_timm": metrics["student"]["backbone"] == "timm_backbone",
        "limitations": card_texts.limitations(metrics),
        "licenses": license_lines(metrics, arguments),
        "versions": card_texts.versions(metrics),
        "citation_note": "Please cite the method and what it builds on.",
        "citations": "\n\n".join(citations_for(metrics)),
        **onnx_texts(onnx_checks, repo_id, threshold),
    }


def card_data(metrics: dict, arguments: CardArguments, name: str) -> ModelCardData:
    """The metadata at the top of a card, with one `model-index` entry for every COCO metric."""
    validation, links = metrics["data"]["val"], links_of(metrics, arguments)
    tags = ["object-detection", metrics["student"]["family"]["tag"]]
    if is_distilled(metrics):
        tags += ["knowledge-distillation", "d3etr"]
    base_model = (links.get("teacher") if learned(metrics) else None) or links.get("started_from")
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


def learned(metrics: dict) -> bool:
    """Whether the run has anything of its teacher: its outputs, or weights."""
    return is_distilled(metrics) or bool(metrics["training"]["inherited"])


def license_lines(metrics: dict, arguments: CardArguments) -> list[str]:
    """The licences of this model and of those that it comes of, as far as they are known, or where they are told."""
    links, licenses = links_of(metrics, arguments), metrics.get("licenses", {})
    sources = {}
    if learned(metrics) and "teacher" in metrics:
        sources["teacher"] = ("Its teacher", metrics["teacher"]["name"])
    if "started_from" in metrics["training"]:
        sources["started_from"] = ("The model that its training started from", metrics["training"]["started_from"])
    lines = [f"This model: {arguments.license}."] if arguments.license else []
    for role, (what, name) in sources.items():
        if role in licenses:
            lines.append(f"{what}, {linked(links.get(role), name)}: {licenses[role]}, as its card says.")
        elif role in links:
            lines.append(f"{what}, {linked(links[role], name)}: as its page says.")
    return lines


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
        found["detections"] = ["ground truth", *teacher, "student" if teacher else "model"]
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
