"""COCO average precision of boxes, as a local `evaluate` metric.

    metric = CocoAveragePrecision()
    metric.compute(predictions=detections, ground_truth="annotations/val.json")

or, with this file's path, `evaluate.load(path, keep_in_memory=True)`. No command imports this file, or `evaluate`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import evaluate

from d3etr_hf.evaluation.coco_average_precision import coco_average_precision

DESCRIPTION = """\
COCO average precision and recall of boxes, over IoU thresholds 0.50:0.95, computed by pycocotools on the original
ground truth: crowd regions are ignored, object sizes come from the annotated areas."""

INPUTS_DESCRIPTION = """
Args:
    predictions: detections in COCO's result format: {"image_id", "category_id", "bbox": [x, y, width, height]
        in pixels, "score"}.
    ground_truth: the COCO detection dictionary, or the path of its JSON file.
    image_ids: evaluate these images only; None for all images of the ground truth.
Returns:
    AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100 and "AP/<class name>", floats in 0..1.
"""

CITATION = """\
@inproceedings{lin2014microsoft,
  title={Microsoft {COCO}: Common Objects in Context},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva and
    Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle={European Conference on Computer Vision},
  year={2014}
}"""


class CocoAveragePrecision(evaluate.Metric):
    """`coco_average_precision` as an `evaluate` metric; see there for what it returns and raises.

    In a distributed run gather the predictions and call `compute` on the main process alone, with `num_process` left
    at 1. Predictions stay in memory; without `keep_in_memory` they pass through a file in the user's cache, for which
    processes wait on each other's lock. `evaluate.load` sets it to False unless told otherwise.
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **options):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        detection = {
            "image_id": datasets.Value("int64"),
            "category_id": datasets.Value("int64"),
            "bbox": datasets.List(datasets.Value("float64")),
            "score": datasets.Value("float64"),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": detection}),
            reference_urls=["https://cocodataset.org/#detection-eval"],
        )

    def _compute(
        self, *, predictions: list[dict], ground_truth: dict | str | Path, image_ids: Iterable[int] | None = None
    ) -> dict[str, float]:
        if isinstance(ground_truth, dict):
            return coco_average_precision(ground_truth, predictions, image_ids)
        content = json.loads(Path(ground_truth).read_text(encoding="utf-8"))
        return coco_average_precision(content, predictions, image_ids)
