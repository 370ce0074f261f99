"""Pictures of what a detector finds, beside another detector and the ground truth, and of where its queries look.

    d3etr visualize --model runs/demo/distilled --compare runs/demo/teacher --data_folder data/shapes
    d3etr visualize --model runs/demo/distilled --images photos --score_threshold 0.3
    d3etr visualize --model runs/demo/distilled --compare runs/demo/teacher --data_folder data/shapes \\
        --attention true --image 2 --detection 1

Writes detections.png (one row per image; pages detections_1.png, ... beyond eight) and attention.png to --output_dir.
Of --images all are drawn, of a data set the first six, unless --first says how many. `--image 2` is the image whose id
is 2 in the data set's annotations; of --images, the second one.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments, check_places
from d3etr_hf.files import make_folder
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.models.loading import family_of_checkpoint, load_detector
from d3etr_hf.visualization.attention_picture import draw_attention_of
from d3etr_hf.visualization.detections_on_images import (
    choose_images,
    common_classes,
    draw_detection_pages,
    model_titles,
)

# how many images of a data set are drawn where nothing else is said
OF_DATA_SET = 6


@dataclass
class PictureArguments:
    """Which models on which images, and where the pictures go."""

    model: str = field(metadata={"help": "The detector: a folder or Hub id."})
    compare: str | None = option(None, "A second detector, for example the teacher: a folder or Hub id.")
    images: list[str] | None = option(None, "Image files, folders and patterns, instead of a data set.")
    split: Literal["val", "train"] = option("val", "Which split of the data set.")
    first: int | None = option(None, "How many images, the first ones; by default all `images`, six of a data set.")
    score_threshold: float = option(0.4, "Detections with a lower score are not drawn.")
    attention: bool = option(False, "Draw the decoder's cross-attention for one detection of the model, too.")
    image: int | None = option(
        None,
        "With `attention`: of which image, by default the first; in a data set its image id, of `images` which one, "
        "counted from 1.",
    )
    detection: int = option(0, "With `attention`: which detection of the model, from 0, highest score first.")
    output_dir: str = option("runs/pictures", "Gets the pictures.")
    batch_size: int = option(8, "Images at a time; predictions depend a little on which images share a batch.")
    use_cpu: bool = option(False, "Do not use a GPU.")

    def __post_init__(self):
        for name, lowest in (("first", 1), ("batch_size", 1), ("detection", 0)):
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {lowest}")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold is {self.score_threshold}: it must be in 0..1")
        if not self.attention and (self.image is not None or self.detection):
            raise ValueError("image and detection choose what attention is drawn for: give --attention true too")


def main() -> None:
    """What `d3etr visualize` runs."""
    arguments, data = parse_arguments((PictureArguments, DataArguments), description=__doc__)
    # the second detector's column and row come first, as a teacher's
    paths = {"compare": arguments.compare, "model": arguments.model}
    paths = {role: path for role, path in paths.items() if path is not None}
    if any((data.data_folder, data.dataset_name, data.train_annotations)):
        check_places(data)
    for role, path in paths.items():
        family_of_checkpoint(path, role)
    output = make_folder(arguments.output_dir)
    source = choose_images(arguments.images, data, arguments.split)
    attended = source.place_of(arguments.image)
    first = arguments.first or (OF_DATA_SET if arguments.images is None else len(source.names))
    device = "cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu"
    titles = dict(zip(paths, model_titles(*paths.values()), strict=True))
    models = {}
    for role, path in paths.items():
        detector = load_detector(path, role)
        size = (data.short_side, data.long_side, data.image_size)
        processor = image_processor_of(detector.config.model_type, path, *size)
        torch.nn.Module.to(detector, device)
        models[titles[role]] = detector, processor
    pages = draw_detection_pages(source, models, output, first, arguments.batch_size, arguments.score_threshold)
    for path, drawn in pages:
        print(f"{path} ({', '.join(drawn)})")
    if arguments.attention:
        detectors = {title: model for title, (model, _) in models.items()}
        processors = {title: processor for title, (_, processor) in models.items()}
        path = output / "attention.png"
        image, _ = source.read(attended)
        names, _ = common_classes(source.class_names, *(model.class_names for model in detectors.values()))
        draw_attention_of(image, detectors, processors, path, names, arguments.detection)
        print(f"{path} ({source.names[attended]})")
