"""The sentences and tables of a model card, each from what was measured; what was not is left out."""

import html
from collections.abc import Sequence

from d3etr_hf.training.instability import ADAPTIVE, AUXILIARY_ASSIGNMENT, OWN_ASSIGNMENT, TEACHER_ASSIGNMENT

METRIC_TITLES = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_small": "S",
    "AP_medium": "M",
    "AP_large": "L",
}
SIZES = {"AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
WEAKEST = 3
DEFAULT_THRESHOLD = 0.4
# as sentences go on from "queries ..."
INSTABILITY_OF = {
    ADAPTIVE: "of the teacher's in adaptive matching",
    OWN_ASSIGNMENT: "of the student's in its own label assignment",
    AUXILIARY_ASSIGNMENT: "of the auxiliary group's in its own label assignment",
    TEACHER_ASSIGNMENT: "of the auxiliary group's in the assignment that the teacher gives",
}
STUDENT, MODEL = "**this student**", "**this model**"  # with a teacher, and without


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right_from: int = 1) -> str:
    """A Markdown table; columns from `right_from` on are numbers."""
    lines = [header, ["---" if column < right_from else "---:" for column in range(len(header))], *rows]
    cells = (
        [html.escape(str(cell), quote=False).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def percent(value: float | None) -> str:
    """A value of 0..1 times 100, with one decimal; an empty cell where it was not measured."""
    return "" if value is None else f"{100 * value:.1f}"


def learned_parts(options: dict) -> list[str]:
    """What the student learned of its teacher's outputs, from the options of the run; nothing without distillation."""
    shared = ["predictions"] if options.get("shared_query_weight", 0) > 0 else []
    if not (options["adaptive_matching"] or (options["fixed_matching"] and options["auxiliary_queries"] == "teacher")):
        return shared
    weights = {
        "self-attention": options["self_attention_weight"],
        "cross-attention": options["cross_attention_weight"],
        "predictions": options["prediction_weight"]
        + options.get("logits_distillation_weight", 0)
        + options.get("shared_query_weight", 0),
    }
    return [part for part, weight in weights.items() if weight > 0]


def rows_of_models(metrics: dict) -> dict[str, dict]:
    """Title → what was measured of it, what the card is of last."""
    rows = {"teacher": metrics["teacher"]} if "teacher" in metrics else {}
    return rows | metrics.get("compared", {}) | {STUDENT if rows else MODEL: metrics["student"]}


def results_table(metrics: dict) -> str:
    """All detectors by all COCO metrics that exist, and how long each was trained."""
    models = rows_of_models(metrics)
    keys = [key for key in METRIC_TITLES if any(key in row["metrics"] for row in models.values())]
    lengths = [key for key in ("steps", "seconds") if any(key in row for row in models.values())]
    rows = []
    for title, row in models.items():
        told = [f"{row[key]:,.0f}" if key in row else "" for key in lengths]
        scores = [percent(row["metrics"].get(key)) for key in keys]
        rows.append([title, f"{row['parameters'] / 1e6:.2f} M", *told, *scores])
    header = ["", "parameters", *(f"training {key}" for key in lengths), *(METRIC_TITLES[key] for key in keys)]
    return table(header, rows)


def class_table(metrics: dict) -> str:
    """Each class: objects in both splits, and every detector's AP."""
    models, data = rows_of_models(metrics), metrics["data"]
    rows = [
        [
            name,
            f"{data['train']['classes'].get(name, 0):,}",
            f"{data['val']['classes'][name]:,}",
            *(percent(row["metrics"].get(f"AP/{name}")) for row in models.values()),
        ]
        for name in data["val"]["classes"]
    ]
    return table(["class", "training objects", "validation objects", *models], rows)


def threshold_table(metrics: dict) -> str | None:
    """Of each class and of all: the best threshold, with F1, precision and recall; None where none was measured."""
    thresholds = metrics["student"].get("thresholds", {})
    rows = dict(thresholds.get("classes", {}))
    if len(rows) != 1 and "all" in thresholds:
        rows["**all classes**"] = thresholds["all"]
    return (
        table(
            ["class", "threshold", "F1", "precision", "recall"],
            [
                [name, repr(row["threshold"]), *(percent(row[key]) for key in ("F1", "precision", "recall"))]
                for name, row in rows.items()
            ],
        )
        if rows
        else None
    )


def suggested_threshold(metrics: dict) -> float:
    """What the card's code shows detections above: the best threshold over all classes, where it was measured."""
    return metrics["student"].get("thresholds", {}).get("all", {}).get("threshold", DEFAULT_THRESHOLD)


def cost_table(metrics: dict) -> str:
    """Parameters, operations and time of teacher and student, and where they are spent."""
    models = {title: row for title, row in rows_of_models(metrics).items() if "flops" in row}
    lines = {
        "parameters": lambda row: f"{row['parameters']:,}",
        "GFLOPs": lambda row: f"{row['flops'] / 1e9:.3g}",
        "milliseconds, median (quartiles)": lambda row: "{median:.1f} ({low:.1f}–{high:.1f})".format(
            **row["milliseconds"]
        ),
        "input, height × width": lambda row: f"{row['height']} × {row['width']}",
    }
    for part in metrics["student"]["parts"]:
        lines[f"share of {part}: parameters / FLOPs"] = lambda row, part=part: _share(row, part)
    return table(["", *models], [[title, *map(tell, models.values())] for title, tell in lines.items()])


def _share(row: dict, part: str) -> str:
    """What a part takes of a model; a dash where nothing is known of the model's parts."""
    if part not in row["parts"]:
        return "–"
    shares = (row["parts"][part][kind] / row[kind] for kind in ("parameters", "flops"))
    return " / ".join(f"{share:.0%}" for share in shares)


def cost_note(metrics: dict) -> str:
    """Where and how the times were measured."""
    environment = metrics["environment"]
    return (
        f"One image at a time in float32 on {environment['device']}, {environment['threads']} thread"
        f"{'s' if environment['threads'] != 1 else ''}, the detectors by turns. An addition and a multiplication "
        "count as two operations."
    )


def data_table(data: dict) -> str:
    """Images and objects of both splits, and images without labels, where there were any."""
    rows = [
        [split, described["name"], f"{described['images']:,}", f"{described['objects']:,}"]
        for split, described in (("training", data["train"]), ("validation", data["val"]))
    ]
    if (unlabeled := data.get("unlabeled")) is not None:
        ratio = f"{unlabeled['ratio']:g} for each image of training"
        rows.insert(1, [f"without labels, {ratio}", unlabeled["name"], f"{unlabeled['images']:,}", "–"])
    return table(["", "data", "images", "objects"], rows, right_from=2)


def instability_note(training: dict) -> str | None:
    """How much matchings changed between two visits of an image; None where it was not logged."""
    shares = training.get("instability", {})
    told = []
    for kind, of_whom in INSTABILITY_OF.items():
        if kind in shares:
            points = zip(shares[kind]["shares"], shares[kind]["steps"], strict=True)
            first, last = (f"{share:.0%} at step {step:,}" for share, step in points)
            told.append(f"{of_whom} {first} and {last}")
    if not told:
        return None
    return (
        "Queries that were matched with another partner than at the image's visit before (mean of the decoder "
        f"layers): {'; '.join(told)}."
    )


def training_table(training: dict) -> str:
    """Length, batch, processes, precision, device and energy of the training."""
    batch = training["batch"]
    rows = [["optimizer steps", f"{training['steps']:,}"]]
    if "started_from" in training:
        rows.append(["started from", f"`{training['started_from']}`"])
    if training["inherited"]:
        rows.append(["weights taken over from the teacher", ", ".join(training["inherited"])])
    if "epochs" in training:
        rows.append(["epochs", f"{training['epochs']:.1f}"])
    parts = f"{batch['per_device']} per device × {batch['processes']} process{'es' if batch['processes'] > 1 else ''}"
    parts += f" × {batch['accumulated']} accumulated" if batch["accumulated"] > 1 else ""
    rows.append(["images a step", f"{training['batch_size']} ({parts})"])
    if "precision" in training:
        rows.append(["precision", training["precision"]])
    if "seconds" in training:
        rows.append(["time of the training steps", duration(training["seconds"])])
    if "environment" in training:
        rows.append(["device", training["environment"]["device"]])
    if "energy" in training:
        energy = training["energy"]
        told = f"{energy['kilowatt_hours']:.3g} kWh, {energy['kilograms_of_co2']:.3g} kg CO₂ (codecarbon's estimate)"
        rows.append(["energy", told])
    rows.append(["seed", training["seed"]])
    return table(["", ""], rows, right_from=2)


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def option_table(training: dict) -> str:
    """The options of the distillation in force, defaults included."""
    rows = [
        [f"`{name}`", f"`{str(value).lower() if isinstance(value, bool) else value}`"]
        for name, value in training["options"].items()
        if value is not None
    ]
    return table(["option", "value"], rows, right_from=2)


def highlights(metrics: dict) -> list[str]:
    """What the student is worth beside its teacher and its controls."""
    student, lines = metrics["student"], []
    if "teacher" in metrics:
        teacher = metrics["teacher"]
        own, its = student["metrics"]["AP"], teacher["metrics"]["AP"]
        whose = "its" if learned_parts(metrics["training"]["options"]) else "the"
        of_teacher = f", {own / its:.0%} of {whose} teacher's {percent(its)}" if its > 0 else ""
        size = [teacher["height"], teacher["width"]]
        elsewhere = "" if size == teacher["taught_at"] else f" (the teacher at its own {size[0]} × {size[1]} pixels)"
        time = student["milliseconds"]["median"] / teacher["milliseconds"]["median"]
        lines.append(
            f"AP {percent(own)}{of_teacher}, with {student['parameters'] / teacher['parameters']:.0%} of the "
            f"teacher's parameters, {student['flops'] / teacher['flops']:.0%} of its operations and {time:.0%} of its "
            f"time for an image{elsewhere}."
        )
    else:
        lines.append(f"AP {percent(student['metrics']['AP'])} with {student['parameters']:,} parameters.")
    for title, row in metrics.get("compared", {}).items():
        gain = 100 * (student["metrics"]["AP"] - row["metrics"]["AP"])
        steps = f", {row['steps']:,} steps" if "steps" in row else ""
        lines.append(f"{gain:+.1f} AP against {title} (AP {percent(row['metrics']['AP'])}{steps}).")
    return lines


def limitations(metrics: dict) -> list[str]:
    """What the student does badly, as measured on the validation split."""
    student, data, lines = metrics["student"]["metrics"], metrics["data"], []
    scores = {name: student[f"AP/{name}"] for name in data["val"]["classes"] if f"AP/{name}" in student}
    weakest = sorted((name for name in scores if scores[name] < student["AP"]), key=scores.get)[:WEAKEST]
    if weakest:
        told = [
            f"{name} (AP {percent(scores[name])}, {data['train']['classes'].get(name, 0):,} training objects)"
            for name in weakest
        ]
        plural, mean = "es" if len(weakest) > 1 else "", percent(student["AP"])
        lines.append(f"Weakest class{plural}: {', '.join(told)}; the mean over classes is {mean}.")
    if unseen := [name for name, count in data["val"]["classes"].items() if count == 0]:
        lines.append(f"Not measured, without an object in the validation split: {', '.join(unseen)}.")
    measured = {size: student[key] for key, size in SIZES.items() if key in student}
    if len(measured) > 1:
        sizes = data["val"]["sizes"]
        told = [f"{size} {percent(value)} ({sizes[size]:,} objects)" for size, value in measured.items()]
        lines.append(f"By size of the object (COCO's limits, pixels of the original image): {', '.join(told)}.")
    if "teacher" in metrics:
        teacher = metrics["teacher"]["metrics"]
        gaps = {name: teacher[f"AP/{name}"] - value for name, value in scores.items() if f"AP/{name}" in teacher}
        furthest = max(gaps, key=gaps.get, default=None)
        if furthest is not None and gaps[furthest] > 0:
            lines.append(
                f"Furthest behind its teacher: {furthest}, by {percent(gaps[furthest])} AP "
                f"({percent(scores[furthest])} against {percent(teacher[f'AP/{furthest}'])})."
            )
    if "AR_100" in student:
        lines.append(f"With 100 detections an image, average recall is {percent(student['AR_100'])}.")
    lines.append(
        f"All figures are from one training run (seed {metrics['training']['seed']}) and {data['val']['images']:,} "
        "validation images; other data were not tried."
    )
    return lines


def versions(metrics: dict) -> str:
    """Versions at training and, where they differ, at measurement."""

    def tell(environment: dict) -> str:
        return ", ".join(f"{package} {version}" for package, version in environment["versions"].items())

    measured, trained = metrics["environment"], metrics["training"].get("environment")
    if trained is None:
        return f"Measured with {tell(measured)}."
    if trained["versions"] == measured["versions"]:
        return f"Trained and measured with {tell(trained)}."
    return f"Trained with {tell(trained)}; measured with {tell(measured)}."
