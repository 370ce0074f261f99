"""Detections on images without annotations: `predict`, and images as a detector takes them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from d3etr_hf.data import DetectionCollator, DetectionTransform
from d3etr_hf.data.image_lists import find_images
from d3etr_hf.data.images import check_head, read_upright
from d3etr_hf.errors import DatasetError, DetectorLoadError, NonFiniteLossError
from d3etr_hf.evaluation.detections import detect
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.families import FAMILIES
from d3etr_hf.models.image_processors import image_processor_of, load_image_processor
from d3etr_hf.models.loading import load_teacher
from d3etr_hf.models.other_detector import OtherDetector

logger = logging.get_logger(__name__)

# rows that are looked through for scores above the threshold; or one a query, where a detector has more
FEWEST_ROWS = 100
MOST_NAMED = 5


def predict(
    model: str | Path,
    images: str | Path | Iterable[str | Path],
    threshold: float = 0.5,
    batch_size: int = 1,
    skip_broken_images: bool = False,
    use_cpu: bool = False,
) -> list[dict[str, Any]]:
    """Detections of a saved detector on images of your own, as the stock `pipeline("object-detection")` finds them.

    Args:
        model: a folder or Hub id: of a family here, or any that `AutoModelForObjectDetection` loads.
        images: files, folders or patterns such as "photos/*.jpg", one or several.
        threshold: detections with a lower score are left out, 0..1.
        batch_size: images at a time; more than one are padded to one size, which changes predictions a little.
        skip_broken_images: leave out what is no readable image, with one warning, instead of refusing it.
        use_cpu: leave a GPU alone.

    Returns:
        Per image `file` (as found), `width`, `height` (pixels, upright) and `detections`, highest score first: each
        `label` (the class's name), `score` (0..1) and `box` ([left, top, right, bottom] in pixels of the upright
        image, not clipped to it).

    Raises:
        DatasetError: no image is named, or one cannot be read.
        DetectorLoadError: the detector cannot be loaded, or has no image processor.
    """
    predictor = Predictor(str(model), batch_size, use_cpu)
    files = readable(find_images(images), skip_broken_images)
    return [record_of(*found, predictor.class_names, threshold) for found in predictor(files, skip_broken_images)]


def readable(files: Sequence[Path], skip_broken_images: bool) -> list[Path]:
    """The files whose heads say that they are images: told of all at once, before a detector sees the first.

    Raises:
        DatasetError: some are none, and are not to be skipped; or none is one.
    """
    good, broken = [], {}
    for path in files:
        try:
            check_head(path)
            good.append(path)
        except DatasetError as error:
            broken[path] = str(error)
    if broken and not (skip_broken_images and good):
        others = f" So {len(broken) - 1} others, the next {list(broken)[1]}." if len(broken) > 1 else ""
        raise DatasetError(f"{next(iter(broken.values()))}{others} --skip_broken_images true leaves such files out.")
    if broken:
        _say_skipped(list(broken))
    return good


def _say_skipped(files: Sequence[Path]) -> None:
    shown = ", ".join(map(str, files[:MOST_NAMED])) + (", ..." if len(files) > MOST_NAMED else "")
    logger.warning(f"left out {len(files)} files that are no readable images: {shown}")


class Predictor:
    """A saved detector that finds objects in image files.

    Args:
        path, batch_size, use_cpu: as `predict`'s.

    Attributes:
        class_names: by label.

    Raises:
        DetectorLoadError: as `predict`.
    """

    def __init__(self, path: str, batch_size: int = 1, use_cpu: bool = False):
        self.model, self.batch_size = load_teacher(path, "model"), batch_size
        self.class_names = self.model.class_names
        self.processor = processor_of(self.model, path)
        torch.nn.Module.to(self.model, "cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        self.model.eval()

    def __call__(
        self, files: Sequence[Path], skip_broken_images: bool = False
    ) -> Iterator[tuple[Path, Image.Image, Tensor]]:
        """File, upright RGB image and detections (n, 6), rows of `select_detections`, image by image.

        Raises:
            DatasetError: an image cannot be read; those before it have been handed out.
            NonFiniteLossError: an output is not finite.
        """
        batch: list[tuple[Path, Image.Image, dict]] = []
        broken: list[Path] = []
        for path in tqdm(files, desc="detecting", unit="image"):
            try:
                image = read_upright(path)
                batch.append((path, image, ImagesForModel([image], [str(path)], self.processor)[0]))
            except DatasetError:
                if not skip_broken_images:
                    yield from self._detect(batch)
                    raise
                broken.append(path)
            if len(batch) == self.batch_size:
                yield from self._detect(batch)
                batch = []
        yield from self._detect(batch)
        if broken:
            _say_skipped(broken)

    @torch.no_grad()
    def _detect(self, batch: list[tuple[Path, Image.Image, dict]]) -> Iterator[tuple[Path, Image.Image, Tensor]]:
        if not batch:
            return
        inputs = DetectionCollator()([example for _, _, example in batch])
        inputs |= {name: inputs[name].to(self.model.device) for name in ("pixel_values", "pixel_mask")}
        rows = max(FEWEST_ROWS, self.model.query_count)
        found = detect(self.model, inputs, self.model.scores, self.model.dtype, rows).cpu()
        for (path, image, _), detections in zip(batch, found, strict=True):
            if not detections.isfinite().all():
                raise NonFiniteLossError(f"{path}: the detector's outputs are not finite: take an earlier checkpoint")
            yield path, image, detections[detections[:, 4] >= 0]


def processor_of(model: Detector | OtherDetector, path: str) -> BaseImageProcessor:
    """The image processor saved beside a detector; of a family here, as evaluation takes it.

    Raises:
        DetectorLoadError: there is none.
    """
    if model.config.model_type in FAMILIES:
        return image_processor_of(model.config.model_type, path)
    processor = load_image_processor(path)
    if processor is None:
        raise DetectorLoadError(f"model {path!r} has no preprocessor_config.json: copy it there from its source")
    return processor


def record_of(
    path: Path, image: Image.Image, detections: Tensor, class_names: Sequence[str], threshold: float
) -> dict[str, Any]:
    """What `predict` tells of one image."""
    found = []
    for left, top, width, height, score, label in detections[detections[:, 4] > threshold].tolist():
        box = [left, top, left + width, top + height]
        found.append({"label": class_names[int(label)], "score": score, "box": box})
    return {"file": str(path), "width": image.width, "height": image.height, "detections": found}


class ImagesForModel(torch.utils.data.Dataset):
    """Images as one model takes them, each as `DetectionTransform` makes an example of it, without objects.

    Args:
        images: RGB, of any sizes.
        names: what an error calls them.
        image_processor: the model's own.
    """

    def __init__(self, images: Sequence[Image.Image], names: Sequence[str], image_processor: BaseImageProcessor):
        self.images, self.names = images, names
        self.transform = DetectionTransform(image_processor)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        """Raises: DatasetError: the image is so narrow that it cannot be resized."""
        nothing = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}
        try:
            return self.transform(self.images[index], {"image_id": index, **nothing})
        except DatasetError as error:
            raise DatasetError(f"{self.names[index]}: {error}") from error
