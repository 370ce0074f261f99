"""What a run spends beside its steps: waiting for batches, and evaluating."""

import time

import numpy as np

from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.evaluation import coco_average_precision
from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.models.image_processors import load_image_processor

from .sizes import Size
from .steps import distillation_trainer, ready, training_step

PREFETCHED = 2  # batches that each worker of a data loader prepares ahead, by default
COCO_TRAIN_IMAGES, COCO_VAL_IMAGES, DETECTIONS = 118_287, 5_000, 100


def waiting_share(size: Size, data_folder: str, precision: str, workers: int = 2, steps: int = 16) -> dict:
    """Share of the training loop's time that it waits for a batch of real images, flipped, of this size.

    The batches that workers prepare ahead during the slow first steps do not count.

    Returns:
        `share` (0..1), and the median seconds of a `wait` and of a `step`.
    """
    ahead = 2 + PREFETCHED * workers
    processor = load_image_processor(None)
    arguments = DataArguments(
        data_folder=data_folder, short_side=size.height, long_side=size.width, augmentation="flip"
    )
    train, _ = load_splits(arguments, processor)
    trainer = ready(
        distillation_trainer(
            size,
            precision,
            train_dataset=train,
            per_device_train_batch_size=size.batch,
            dataloader_num_workers=workers,
        )
    )
    loader, waits, seconds = trainer.get_train_dataloader(), [], []
    batches = iter(loader)
    for _ in range(ahead + steps):
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # the epoch is over: starting its workers again is waiting too
            batches = iter(loader)
            batch = next(batches)
        waits.append(time.perf_counter() - start)
        seconds.append(seconds_of(lambda batch=batch: training_step(trainer, batch)))
    waits, seconds = np.array(waits[ahead:]), np.array(seconds[ahead:])
    return {
        "share": float(waits.sum() / (waits.sum() + seconds.sum())),
        "wait": float(np.median(waits)),
        "step": float(np.median(seconds)),
    }


def evaluation_seconds(classes: int = 80, images: int = COCO_VAL_IMAGES, objects: int = 7) -> float:
    """Seconds of COCO average precision over random objects and a hundred detections an image."""
    generator = np.random.default_rng(0)
    ground_truth = {
        "images": [{"id": image, "width": 640, "height": 480} for image in range(images)],
        "categories": [{"id": label + 1, "name": f"class {label}"} for label in range(classes)],
        "annotations": [],
    }
    predictions = []
    for image in range(images):
        boxes = np.round(generator.uniform([0, 0, 8, 8], [400, 300, 240, 180], (objects, 4)), 1)
        labels = generator.integers(1, classes + 1, objects)
        for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
            number = len(ground_truth["annotations"]) + 1
            region = {"id": number, "image_id": image, "category_id": label, "bbox": box, "iscrowd": 0}
            ground_truth["annotations"].append(region | {"area": box[2] * box[3]})
        chosen = generator.integers(objects, size=DETECTIONS)
        moved = boxes[chosen] + generator.normal(0, 8, (DETECTIONS, 4))
        moved[:, 2:] = moved[:, 2:].clip(min=1)
        for label, box, score in zip(
            labels[chosen].tolist(), moved.tolist(), generator.random(DETECTIONS).tolist(), strict=True
        ):
            predictions.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    return seconds_of(lambda: coco_average_precision(ground_truth, predictions))
