"""The best threshold, against every threshold tried with a matching written out."""

import numpy as np
import pytest
import torch

from d3etr_hf.data import find_coco_split, load_coco_split
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.evaluation import best_thresholds
from d3etr_hf.evaluation.thresholds import best_threshold, shortest_between


def overlap(box, other, of_first=False) -> float:
    """IoU of two boxes xywh, or the share of the first that lies in the other."""
    sides = [min(box[i] + box[i + 2], other[i] + other[i + 2]) - max(box[i], other[i]) for i in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    first = box[2] * box[3]
    return common / (first if of_first else first + other[2] * other[3] - common)


def count(rows, regions, threshold) -> tuple[int, int]:
    """How many detections of one image and class are right and how many are wrong above a threshold."""
    free, right, wrong = [region for region in regions if not region["iscrowd"]], 0, 0
    for row in sorted((row for row in rows if row[4] > threshold), key=lambda row: -row[4]):
        best = max(free, key=lambda region: overlap(row, region["bbox"]), default=None)
        if best is not None and overlap(row, best["bbox"]) >= 0.5:
            free.remove(best)
            right += 1
        elif not any(region["iscrowd"] and overlap(row, region["bbox"], True) >= 0.5 for region in regions):
            wrong += 1
    return right, wrong


def f1_of(detections, dataset, labels, threshold) -> tuple[float, float, float]:
    """F1, precision and recall, pooled over these classes and all images."""
    truth, right, wrong, objects = dataset.ground_truth["annotations"], 0, 0, 0
    for image_id, rows in zip(dataset.rows["image_id"], detections.double().tolist(), strict=True):
        for label in labels:
            regions = [
                region
                for region in truth
                if (region["image_id"], region["category_id"]) == (image_id, dataset.category_ids[label])
            ]
            objects += sum(not region["iscrowd"] for region in regions)
            found = count([row for row in rows if row[5] == label and row[4] >= 0], regions, threshold)
            right, wrong = right + found[0], wrong + found[1]
    return 2 * right / (right + wrong + objects), right / max(right + wrong, 1), right / objects


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Shapes, every seventh a crowd region, and detections of them: shaken, doubled, of wrong classes, tied."""
    folder = make_shapes(tmp_path_factory.mktemp("shapes"), 1, 10, image_size=96, progress=False)
    dataset = load_coco_split(*find_coco_split(folder, "val"))
    for index, region in enumerate(dataset.ground_truth["annotations"]):
        region["iscrowd"] = int(index % 7 == 3)
    generator = np.random.default_rng(0)
    detections = torch.zeros(len(dataset), 100, 6)
    detections[..., 4] = -1
    for image, image_id in enumerate(dataset.rows["image_id"]):
        rows = []
        for region in dataset.ground_truth["annotations"]:
            if region["image_id"] != image_id:
                continue
            for _ in range(3):
                box = np.array(region["bbox"]) * generator.normal(1, 0.12, 4)
                label = dataset.category_ids.index(region["category_id"])
                label = label if generator.random() < 0.8 else int(generator.integers(3))
                rows.append([*box, round(float(generator.random()), 2), label])
        for box in generator.uniform(5, 50, (5, 4)):
            rows.append([*box, round(float(generator.random()) / 2, 2), int(generator.integers(3))])
        detections[image, : len(rows)] = torch.tensor(rows)
    return detections, dataset


def test_no_threshold_is_better(split):
    """Of each class and of all; F1, precision and recall are those at the threshold itself."""
    detections, dataset = split
    found = best_thresholds(detections, dataset)
    assert list(found["classes"]) == dataset.class_names
    cases = {name: [label] for label, name in enumerate(dataset.class_names)} | {"all": [0, 1, 2]}
    candidates = sorted({0.0, *detections[..., 4][detections[..., 4] >= 0].double().tolist()})
    for name, labels in cases.items():
        best = found["all"] if name == "all" else found["classes"][name]
        tried = [f1_of(detections, dataset, labels, candidate)[0] for candidate in candidates]
        at_best = f1_of(detections, dataset, labels, best["threshold"])
        assert at_best == pytest.approx((best["F1"], best["precision"], best["recall"]), abs=1e-12)
        assert best["F1"] == pytest.approx(max(tried), abs=1e-12) and min(tried) < max(tried) - 0.1
        assert 0 < best["recall"] < 1 and len(repr(best["threshold"])) <= 5


def test_what_is_never_found_has_no_threshold(split):
    detections, dataset = split
    without = detections.clone()
    without[..., 4] = torch.where(without[..., 5] == 1, -1.0, without[..., 4])
    assert list(best_thresholds(without, dataset)["classes"]) == [dataset.class_names[0], dataset.class_names[2]]
    without[..., 4] = -1
    assert best_thresholds(without, dataset) == {"classes": {}}
    assert best_threshold(np.empty(0), np.empty(0, dtype=bool), 3) is None


@pytest.mark.parametrize(
    ("low", "high", "number"),
    [(0.2, 0.7, 0.5), (0.31, 0.39, 0.35), (0.0, 0.001, 0.001), (0.123, 0.124, 0.1235), (0.0, 1.0, 0.5)],
)
def test_few_digits(low, high, number):
    found = shortest_between(low, high)
    assert low <= found < high and len(repr(found)) <= len(repr(number)) + 1


def test_neighbours_of_float32_are_told_apart():
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    assert low <= np.float32(shortest_between(float(low), float(high))) < high
