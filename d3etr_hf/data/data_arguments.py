"""Which data to train on and how to prepare it."""

import copy
import math
from dataclasses import dataclass, field
from typing import Literal

from transformers.image_processing_utils import BaseImageProcessor

from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.data.image_checks import Decide, check_images
from d3etr_hf.data.image_sizes import see_the_same, set_image_size, size_of, takes_fixed_size
from d3etr_hf.data.reading import read_splits
from d3etr_hf.data.strong_augmentation import Mosaic, StrongAugmentation
from d3etr_hf.data.transforms import Augmentation, CropSizes, DetectionTransform
from d3etr_hf.data.unlabeled import check_unlabeled_images, load_unlabeled
from d3etr_hf.errors import DatasetError

# Of DETR, whose short side at evaluation is 800; everything else is scaled from here.
DETR_SHORT_SIDE = 800
DETR_AUGMENTATION_SHORT_SIDES = range(480, 801, 32)
# Of RT-DETR, whose squares at evaluation are of 640; a batch's side is a multiple of its backbone's stride.
SQUARE_SIDE, SQUARE_MULTIPLE = 640, 32
SQUARE_AUGMENTATION_SIDES = range(480, 801, 32)
SMALLEST_SIDE = 16
DRAW_SIZES = ("multiscale", "paper", "strong")  # augmentations
MOST_UNLABELED = 100  # for each labelled image


@dataclass
class DataArguments:
    """Where the images and annotations are, their size, and the augmentation.

    The data come from one of three places: `data_folder`, `dataset_name`, or the explicit paths.
    """

    data_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a data set: COCO (annotations/train.json, annotations/val.json, train/, val/; or as "
            "Roboflow, CVAT and Label Studio write it), YOLO (or its data.yaml), Pascal VOC, or images with "
            "metadata.jsonl."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of an object detection data set, or a local folder of Parquet files or of images with "
            "metadata.jsonl."
        },
    )
    dataset_train_split: str = field(
        default="train",
        metadata={
            "help": "Split of `dataset_name` or `data_folder` to train on; a slice of one is written as train[:80%%]."
        },
    )
    dataset_val_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of `dataset_name` or `data_folder` to evaluate on, or a slice of one; by default the "
            "validation split, else the only other one."
        },
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training split's images, between 0 and 1, that is held out at random and evaluated "
            "on, instead of a validation split."
        },
    )
    validation_seed: int = field(default=0, metadata={"help": "Seed of what `validation_fraction` holds out."})
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of all classes, in order of their category ids, for data that number them, or name them "
            "otherwise; the data's own names in another order set the order of the classes, and rename none."
        },
    )
    rename_classes: dict | None = field(
        default=None,
        metadata={
            "help": "Other names for some of the classes, by the data's, for example the teacher's: "
            '{"motorbike": "motorcycle"}.'
        },
    )
    train_annotations: str | None = field(default=None, metadata={"help": "COCO JSON of the training split."})
    train_images: str | None = field(default=None, metadata={"help": "Image folder of the training split."})
    val_annotations: str | None = field(default=None, metadata={"help": "COCO JSON of the validation split."})
    val_images: str | None = field(default=None, metadata={"help": "Image folder of the validation split."})
    unlabeled_images: str | None = field(
        default=None,
        metadata={
            "help": "Folder of further training images, those in its subfolders among them, that have no labels: "
            "the teacher alone supervises them, by all distillation terms that read no ground truth. Images of the "
            "training split that lie there, too, keep their labels; so it may be a folder of which only a part is "
            "labelled."
        },
    )
    unlabeled_ratio: float = field(
        default=1.0,
        metadata={
            "help": "How many images of `unlabeled_images` come for each labelled one, in every batch and so in every "
            "epoch, which has each labelled image once: with 1 and a batch of 16 they are 8 and 8, with 3 they are 4 "
            "labelled and 12 without labels. Above 0, up to 100."
        },
    )
    short_side: int | None = field(
        default=None,
        metadata={
            "help": "Short side of the images at evaluation, and the scale of the augmentation, in pixels; by default "
            "that of the image processor saved with the model or the teacher, else 800. Give long_side with it."
        },
    )
    long_side: int | None = field(
        default=None,
        metadata={
            "help": "Longest side allowed, in pixels; the short side gives way to it. Without a saved one 1333."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square that images are resized to, in pixels, for families that take squares instead "
            "of short_side and long_side; by default that of the image processor saved with the model or the teacher, "
            "else the family's own. It holds for a teacher that takes squares, too."
        },
    )
    augmentation: Literal["none", "flip", "multiscale", "paper", "strong"] = field(
        default="paper",
        metadata={
            "help": "Of training images: none; flip (horizontal); multiscale (flip, random short side, or of squares "
            "one random side for a whole batch); paper (as multiscale, and every second image is cropped first, as in "
            "Conditional DETR); strong (as multiscale after colours, zooming out and crops by overlap, as RT-DETR)."
        },
    )
    augmentation_short_sides: list[int] | None = field(
        default=None,
        metadata={
            "help": "Short sides, or sides of squares, that multiscale, paper and strong draw from; by default 480 to "
            "800 in steps of 32, times short_side / 800, or for squares times image_size / 640 in multiples of 32 and "
            "of what the model needs (if image_size is no such multiple, paper and strong keep to it)."
        },
    )
    strong_end_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the training after which augmentation strong is multiscale (D-FINE: 0.99)."},
    )
    mosaic: float = field(
        default=0.0,
        metadata={"help": "Share of training images that are put together with three others in one, 0 to 1."},
    )
    mosaic_end_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of the training after which there are no more mosaics (DEIM: about half)."},
    )
    max_train_images: int | None = field(default=None, metadata={"help": "Train on the first so many images only."})
    max_val_images: int | None = field(default=None, metadata={"help": "Evaluate on the first so many images only."})
    dataset_workers: int = field(default=1, metadata={"help": "Processes that prepare `dataset_name`."})

    allow_images_elsewhere: bool = field(
        default=False,
        metadata={
            "help": "Read images that lie outside the folders named here and Hugging Face's caches, too, as links or "
            "paths in the data lead to them; for data whose makers you trust."
        },
    )

    hash_images: bool = field(
        default=False,
        metadata={
            "help": "Have a run that goes on compare the content of all images with what it was, and not only their "
            "names and sizes: the main process reads them all when it starts, and again those of changed time, while "
            "others wait (up to 256 MB that is done anyway)."
        },
    )

    skip_broken_images: bool = field(
        default=False,
        metadata={
            "help": "Leave out images that cannot be read, are of another size than annotated or hold more than 8 "
            "bits a channel, with one warning, instead of refusing them; of both splits."
        },
    )

    def __post_init__(self) -> None:
        explicit = [self.train_annotations, self.train_images]
        of_validation = [self.val_annotations, self.val_images]
        if self.validation_fraction is None:
            explicit += of_validation
        elif any(of_validation) or self.dataset_val_split is not None:
            raise ValueError("give validation_fraction, or a validation split (dataset_val_split, val_...), not both.")
        if any(explicit) and not all(explicit):
            validation = ", val_annotations and val_images" if self.validation_fraction is None else ""
            raise ValueError(f"give all of train_annotations, train_images{validation}, or none.")
        self._check_splits_and_classes()
        places = (self.data_folder is not None) + (self.dataset_name is not None) + any(explicit)
        if places > 1:
            raise ValueError("give one of data_folder, dataset_name or the explicit paths, not several.")
        if (self.short_side is None) != (self.long_side is None):
            raise ValueError("give both short_side and long_side, or neither.")
        if self.short_side is not None and self.short_side < SMALLEST_SIDE:
            raise ValueError(f"short_side is {self.short_side}: it must be at least {SMALLEST_SIDE} pixels.")
        if self.short_side is not None and self.long_side < self.short_side:
            raise ValueError(
                f"long_side is {self.long_side}: it must be at least short_side, which is {self.short_side} pixels."
            )
        if self.image_size is not None and self.short_side is not None:
            raise ValueError("give image_size, or short_side and long_side, as the model takes images: not both.")
        if self.image_size is not None and self.image_size < SMALLEST_SIDE:
            raise ValueError(f"image_size is {self.image_size}: it must be at least {SMALLEST_SIDE} pixels.")
        if self.augmentation not in ("none", "flip", *DRAW_SIZES):
            raise ValueError(f"augmentation is {self.augmentation!r}: choose none, flip, multiscale, paper or strong.")
        self._check_strong_augmentation()
        if not 0 < self.unlabeled_ratio <= MOST_UNLABELED:
            raise ValueError(
                f"unlabeled_ratio is {self.unlabeled_ratio}: it must be above 0, and at most {MOST_UNLABELED}."
            )
        if self.unlabeled_images is None and self.unlabeled_ratio != 1:
            raise ValueError("unlabeled_ratio has no effect without unlabeled_images: leave it out.")
        if self.augmentation_short_sides is not None:
            self._check_augmentation_short_sides(self.augmentation_short_sides)
        for name, value in (("max_train_images", self.max_train_images), ("max_val_images", self.max_val_images)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1, or left out for all images.")
        if self.dataset_workers < 1:
            raise ValueError(f"dataset_workers is {self.dataset_workers}: it must be at least 1.")

    def _check_strong_augmentation(self) -> None:
        for name in ("strong_end_fraction", "mosaic", "mosaic_end_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from 0 to 1.")
        if self.mosaic > 0 and self.augmentation == "none":
            raise ValueError(f"mosaic is {self.mosaic}, and augmentation none: leave mosaic out, or choose another.")
        for name, acts in (
            ("strong_end_fraction", self.augmentation == "strong"),
            ("mosaic_end_fraction", self.mosaic > 0),
        ):
            if not acts and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                whose = "augmentation strong" if name.startswith("strong") else "mosaic above 0"
                raise ValueError(f"{name} has no effect without {whose}: leave it out.")

    def _check_splits_and_classes(self) -> None:
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}: it must be between 0 and 1.")
        if self.validation_seed < 0:
            raise ValueError(f"validation_seed is {self.validation_seed}: it must be at least 0.")
        if self.class_names is not None and len(set(self.class_names)) < max(len(self.class_names), 1):
            raise ValueError(f"class_names is {self.class_names}: give at least one name, and each once.")
        if not all(map(str.strip, self.class_names or ())):
            raise ValueError(f"class_names is {self.class_names}: give each class a name, none of blanks.")
        renamed = self.rename_classes or {}
        if not all(isinstance(name, str) for pair in renamed.items() for name in pair):
            raise ValueError(f"rename_classes is {renamed}: give a name for each name.")
        if not all(map(str.strip, renamed.values())):
            raise ValueError(f"rename_classes is {renamed}: give each class a name, none of blanks.")

    def _check_augmentation_short_sides(self, short_sides: list[int]) -> None:
        if self.augmentation not in DRAW_SIZES:
            raise ValueError(
                f"augmentation_short_sides has no effect with augmentation {self.augmentation!r}: leave it out, or "
                "choose multiscale, paper or strong."
            )
        if not short_sides or min(short_sides) < SMALLEST_SIDE:
            raise ValueError(
                f"augmentation_short_sides is {short_sides}: give at least one, each at least {SMALLEST_SIDE} pixels."
            )
        if self.long_side is not None and max(short_sides) > self.long_side:
            raise ValueError(
                f"augmentation_short_sides is {short_sides}: none may exceed long_side, which is {self.long_side} "
                "pixels."
            )


def load_splits(
    arguments: DataArguments,
    image_processor: BaseImageProcessor,
    teacher_processor: BaseImageProcessor | None = None,
    trains: bool = True,
    decide: Decide = lambda find: find(),
) -> tuple[DetectionDataset, DetectionDataset]:
    """The training split, augmented, with images without labels where such are named; and validation, resized only.

    What is wrong with their images is told now, see `check_images`.

    Args:
        arguments: see there.
        image_processor: of the model. Its `size` is set to the arguments' where that is given, so that the processor
            saved with the model resizes as evaluation did.
        teacher_processor: of its teacher, if it has one. Where that makes other pixels the training split has them,
            too; a size that is given holds for a teacher that is sized in the model's way. It is not changed.
        trains: whether the training split is used, or only the validation split: then the former's images are not
            looked at.
        decide: see `check_images`.

    Raises:
        DatasetError: no data are named, a split cannot be loaded, the two have different categories, images are
            broken, or the model is not sized as the arguments say.
    """
    size = (arguments.short_side, arguments.long_side, arguments.image_size)
    set_image_size(image_processor, *size)
    augmentation = augmentation_for(arguments, image_processor)
    train, val = load_annotated(arguments)
    unlabeled = None
    if trains and arguments.unlabeled_images is not None:
        unlabeled = load_unlabeled(arguments.unlabeled_images, train, arguments.allow_images_elsewhere)
    train, val = _checked(train, val, arguments.skip_broken_images, trains, decide)
    if unlabeled is not None:
        unlabeled = check_unlabeled_images(unlabeled, train, val, arguments.skip_broken_images, decide)
    if teacher_processor is not None:
        teacher_processor = copy.deepcopy(teacher_processor)
        if takes_fixed_size(teacher_processor) == takes_fixed_size(image_processor):
            set_image_size(teacher_processor, *size)
        if see_the_same(image_processor, teacher_processor):
            teacher_processor = None
    train = train.with_transform(DetectionTransform(image_processor, augmentation, teacher_processor))
    if arguments.mosaic > 0:
        train.mosaic = Mosaic(arguments.mosaic, arguments.mosaic_end_fraction)
    if unlabeled is not None:
        train = train.with_unlabeled(unlabeled, arguments.unlabeled_ratio)
    return (
        train,
        val.with_transform(DetectionTransform(image_processor)),
    )


def with_side_divisor(
    train: DetectionDataset, arguments: DataArguments, side_divisor: int, teacher_side_divisor: int = 1
) -> DetectionDataset:
    """The training split of `load_splits` with an augmentation that draws no size of which a model takes no image.

    Args:
        train: whose transform is a `DetectionTransform`.
        arguments: those that it was loaded by.
        side_divisor: what both sides of the model's images must be multiples of, pixels.
        teacher_side_divisor: the same of its teacher; it counts where the teacher sees the model's pixels.

    Raises:
        DatasetError: `multiscale` at a size that has no such sides, and none were given.
    """
    processor, teacher_processor = train.transform.image_processor, train.transform.teacher_processor
    divisor = side_divisor if teacher_processor is not None else math.lcm(side_divisor, teacher_side_divisor)
    augmentation = augmentation_for(arguments, processor, divisor)
    return train.with_transform(DetectionTransform(processor, augmentation, teacher_processor))


def augmentation_for(
    arguments: DataArguments, image_processor: BaseImageProcessor, side_divisor: int = 1
) -> Augmentation | None:
    """The augmentation of training images at the size of this image processor; None for `none`.

    Args:
        arguments: which one, and the sides to draw from.
        image_processor: of the model.
        side_divisor: what drawn sides of images of one size are multiples of, pixels.

    Raises:
        DatasetError: the image processor has no size, or one that the augmentation cannot vary.
    """
    size = size_of(image_processor)
    if size.max_height and size.max_height == size.max_width:  # an image that fits into a square has its long side
        return build_augmentation(arguments, size.max_height, size.max_height)
    if takes_fixed_size(image_processor):
        return build_fixed_size_augmentation(arguments, size.height, size.width, side_divisor)
    if not (size.shortest_edge and size.longest_edge):
        raise DatasetError(f"the image processor's size is {dict(size)}: give short_side and long_side.")
    return build_augmentation(arguments, size.shortest_edge, size.longest_edge)


def build_augmentation(arguments: DataArguments, short_side: int, long_side: int) -> Augmentation | None:
    """The augmentation of training images, with DETR's sizes scaled by short_side / 800; None for `none`.

    Args:
        arguments: which one, and the short sides to draw from.
        short_side, long_side: of the images at evaluation, pixels.
    """
    if arguments.augmentation == "none":
        return None
    if arguments.augmentation == "flip":
        return Augmentation([short_side], long_side)
    factor = short_side / DETR_SHORT_SIDE
    short_sides = arguments.augmentation_short_sides or [
        round(side * factor) for side in DETR_AUGMENTATION_SHORT_SIDES
    ]
    if arguments.augmentation == "strong":
        return StrongAugmentation(arguments.strong_end_fraction, short_sides=short_sides, long_side=long_side)
    crop = CropSizes().scaled(factor) if arguments.augmentation == "paper" else None
    return Augmentation(short_sides, long_side, crop)


def build_fixed_size_augmentation(
    arguments: DataArguments, height: int, width: int, side_divisor: int = 1
) -> Augmentation | None:
    """The augmentation of training images that are all of one size; None for `none`.

    The size is drawn for a whole batch, as RT-DETR's authors do, whose sides are scaled by the side / 640; DETR's crop
    takes the same share of an image as at 800 pixels.

    Args:
        arguments: which one, and the sides to draw from.
        height, width: of the images at evaluation, pixels.
        side_divisor: what the sides are multiples of beside 32, pixels; given ones are taken as they are.

    Raises:
        DatasetError: `multiscale` at a size that has no such sides, and none were given.
    """
    if arguments.augmentation == "none":
        return None
    if arguments.augmentation == "flip":
        return Augmentation()
    multiple = math.lcm(SQUARE_MULTIPLE, side_divisor)
    if arguments.augmentation_short_sides is not None:
        sides = arguments.augmentation_short_sides
    elif height == width and height % multiple == 0:
        steps = [round(side * height / SQUARE_SIDE / multiple) for side in SQUARE_AUGMENTATION_SIDES]
        sides = [step * multiple for step in steps]
    elif arguments.augmentation == "multiscale":
        raise DatasetError(
            f"augmentation multiscale draws sides in multiples of {multiple}, and images of {width}×{height} "
            "pixels are none: give augmentation_short_sides, or choose flip or paper."
        )
    else:
        sides = []
    batch_sizes = [(side, side) for side in sides]
    if arguments.augmentation == "strong":
        return StrongAugmentation(arguments.strong_end_fraction, batch_sizes=batch_sizes)
    crop = CropSizes() if arguments.augmentation == "paper" else None
    return Augmentation(crop=crop, batch_sizes=batch_sizes)


def load_annotated(arguments: DataArguments) -> tuple[DetectionDataset, DetectionDataset]:
    """The splits without a transform, as many images of each as the arguments say; none has been looked at.

    Raises:
        DatasetError: no data are named, a split cannot be loaded, or the two have different categories.
    """
    train, val = read_splits(arguments)
    if arguments.max_train_images is not None:
        train = train.select(range(min(arguments.max_train_images, len(train))))
    if arguments.max_val_images is not None:
        val = val.select(range(min(arguments.max_val_images, len(val))))
    return train, val


def _checked(
    train: DetectionDataset, val: DetectionDataset, skip_broken: bool, trains: bool, decide: Decide
) -> tuple[DetectionDataset, DetectionDataset]:
    if not trains:
        return train, *check_images([val], skip_broken, decide)
    train, val = check_images([train, val], skip_broken, decide)
    return train, val
