"""What a detector's decoder is worth and costs, layer by layer, and what decoder distillation can bring it.

    d3etr analyze runs/demo/teacher --data_folder data/shapes
    d3etr analyze facebook/detr-resnet-50            # without data: parameters, operations and time only
    d3etr analyze configs/coco/r50_model.yaml        # the same before there are weights

Prints tables and a verdict, and writes them to analysis.json in --output_dir.
"""

from dataclasses import dataclass, field

from d3etr_hf.cli.benchmark import costs_of, detector_of, format_costs, is_configuration
from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments, check_places, load_splits
from d3etr_hf.errors import CommandLineError
from d3etr_hf.evaluation.structure import SINK, as_rows, layer_structures
from d3etr_hf.files import make_folder, write_json
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.training.teacher import with_classes_of

# what half a point of AP and a tenth of the cost are: below it the verdict calls a difference none
LITTLE_AP, LITTLE_SHARE = 0.005, 0.1


@dataclass
class AnalysisArguments:
    """Which detector, and on images of which size its cost is measured."""

    model: str = field(
        metadata={
            "help": "The detector: a folder, a Hub id or, without data, a model's configuration (.yaml, .json); "
            "also taken as the first argument."
        }
    )
    output_dir: str = option("runs/analysis", "Gets analysis.json.")
    batch_size: int = option(8, "Images at once; predictions depend a little on which images share a batch.")
    height: int = option(480, "Height of the image whose cost is measured, pixels, before it is resized.")
    width: int = option(640, "Width of the image whose cost is measured, pixels, before it is resized.")
    use_cpu: bool = option(False, "Do not use a GPU.")

    def __post_init__(self):
        for name in ("batch_size", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


def main() -> None:
    """What `d3etr analyze` runs."""
    arguments, data = parse_arguments((AnalysisArguments, DataArguments), description=__doc__, first_argument="model")
    has_data = data != DataArguments()
    if has_data:
        if is_configuration(arguments.model):
            raise CommandLineError(
                f"{arguments.model!r} is a configuration, and random weights detect nothing on data: give a "
                "checkpoint, or leave the data out"
            )
        check_places(data)
    path = make_folder(arguments.output_dir) / "analysis.json"
    detector = detector_of(arguments.model)
    cost = costs_of({arguments.model: detector}, arguments.height, arguments.width, use_cpu=arguments.use_cpu)
    layers = analyze_layers(detector, arguments.model, data, arguments.batch_size) if has_data else []
    print(format_costs(cost))
    if layers:
        print(f"\n{format_layers(layers)}")
    said = verdict(cost[arguments.model], layers)
    print("\n" + "\n".join(said))
    write_json(path, {"model": arguments.model, "cost": cost[arguments.model], "layers": layers, "verdict": said})


def analyze_layers(
    detector: Detector, source: str, data: DataArguments, batch_size: int = 8
) -> list[dict[str, float]]:
    """The figures of `LayerStructure` for each decoder layer of a detector, on the validation split.

    Args:
        source: the folder or Hub id that it was loaded from, with its image processor.

    Raises:
        DatasetError, IncompatibleTeacherError: the data cannot be read, or are of other classes.
        EvaluationError: the validation split has no object.
    """
    _, val = load_splits(data, image_processor_of(detector.config.model_type, source), trains=False)
    return as_rows(layer_structures(with_classes_of(detector, val.class_names, "model"), val, batch_size))


def format_layers(layers: list[dict[str, float]]) -> str:
    """A table for a terminal: a line a decoder layer."""
    lines = [
        f"{'layer':<6}{'AP':>7}{'AP50':>7}{'query sinks':>13}{'mass':>6}{'cell sinks':>12}{'mass':>6}"
        f"{'on objects':>12}{'even':>7}"
    ]
    for index, row in enumerate(layers):
        lines.append(
            f"{index:<6}{100 * row['AP']:>7.1f}{100 * row['AP50']:>7.1f}{row['self_sinks']:>13.1f}"
            f"{row['self_sink_mass']:>6.0%}{row['cross_sinks']:>12.1f}{row['cross_sink_mass']:>6.0%}"
            f"{row['cross_on_objects']:>12.0%}{row['object_area']:>7.0%}"
        )
    lines.append(f"sinks: what gets more than {SINK:.0f} times its even share of self- or cross-attention")
    return "\n".join(lines)


def verdict(cost: dict, layers: list[dict[str, float]]) -> list[str]:
    """What decoder distillation can bring a detector and what it cannot, in plain words.

    Args:
        cost: as `measure_costs` gives it.
        layers: as `analyze_layers` gives them; empty without data.
    """
    shares = {part: value["flops"] / cost["flops"] for part, value in cost["parts"].items()}
    before, decoder = shares.get("backbone", 0) + shares.get("encoder", 0), shares.get("decoder", 0)
    said = [
        f"Decoder: {decoder:.0%} of the operations; backbone and encoder: {before:.0%}. A student with half the "
        f"decoder layers saves about {decoder / 2:.0%}"
        + (": for speed it needs a smaller backbone." if decoder / 2 < LITTLE_SHARE else ".")
    ]
    if not layers:
        return said
    last = layers[-1]["AP"]
    enough = next(index for index, row in enumerate(layers) if row["AP"] >= last - LITTLE_AP)
    if enough + 1 < len(layers):
        said.append(
            f"Layer {enough} alone has AP {100 * layers[enough]['AP']:.1f} of the last layer's {100 * last:.1f}: a "
            f"student with {enough + 1} of {len(layers)} decoder layers can keep nearly all, and distillation that "
            "maps its last layer to the teacher's last has a target of use."
        )
    else:
        said.append(
            f"Each layer adds something up to the last (AP {100 * layers[0]['AP']:.1f} after the first, "
            f"{100 * last:.1f} after the last): fewer decoder layers will cost AP, of which distillation can bring "
            "back a part."
        )
    said.append(
        "These layers were trained together. What a model with fewer reaches when it is trained anew, after a short "
        "and a long schedule, only training shows: d3etr compare configs/evidence/decoder_layers.yaml, with this "
        "model's configuration."
    )
    masses = [row["self_sink_mass"] for row in layers]
    if max(masses) > LITTLE_SHARE:
        layer = masses.index(max(masses))
        said.append(
            f"In layer {layer} {masses[layer]:.0%} of self-attention goes to {layers[layer]['self_sinks']:.1f} "
            "queries that everything looks at: a student copies such sinks, too, and self-attention distillation says "
            "little about relations between objects there."
        )
    gain = [row["cross_on_objects"] / row["object_area"] for row in layers if row["object_area"] > 0]
    if gain:
        said.append(
            f"Cross-attention lies on objects {gain[-1]:.1f} times as much as if it were spread evenly, in the last "
            "layer: " + ("there is something to copy." if gain[-1] > 1.5 else "it says little of where objects are.")
        )
    return said
