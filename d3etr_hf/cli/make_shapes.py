"""Makes the synthetic shapes data set (circles, rectangles, triangles) as a COCO-format folder.

    d3etr make-shapes --folder data/shapes
    d3etr make-shapes --folder data/shapes_small --train_images 200 --val_images 50

The same arguments make the same images.
"""

from dataclasses import dataclass, field

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data.shapes import make_shapes


@dataclass
class ShapesArguments:
    """What to make, and where."""

    folder: str = field(metadata={"help": "The folder to make; left alone where it already holds this data set."})
    train_images: int = field(default=4000, metadata={"help": "Number of training images, at least 1."})
    val_images: int = field(default=200, metadata={"help": "Number of validation images, at least 1."})
    image_size: int = field(default=96, metadata={"help": "Width and height of an image in pixels, at least 44."})
    seed: int = field(default=0, metadata={"help": "Seed of all random choices, at least 0."})


def main() -> None:
    """What `d3etr make-shapes` runs."""
    (arguments,) = parse_arguments([ShapesArguments], description=__doc__)
    folder = make_shapes(
        arguments.folder, arguments.train_images, arguments.val_images, arguments.image_size, arguments.seed
    )
    print(f"{folder}: {arguments.train_images} training and {arguments.val_images} validation images")
