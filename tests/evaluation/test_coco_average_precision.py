import contextlib
import copy
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d3etr_hf.evaluation import CocoAveragePrecision, coco_average_precision

REPOSITORY = Path(__file__).resolve().parents[2]
METRIC_FILE = REPOSITORY / "d3etr_hf" / "evaluation" / "coco_metric.py"
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")


def directly_by_pycocotools(annotation_file, predictions, image_ids=None):
    """The untouched file through pycocotools' own reader, `loadRes` and `summarize`."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(annotation_file))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(copy.deepcopy(predictions)), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: value for name, value in zip(NAMES, evaluation.stats, strict=False) if value >= 0}


def perturbed_predictions(ground_truth, seed, box_noise=0.1, false_positives=5):
    """Shaken ground truth boxes, some with another class or missing, and random boxes."""
    generator = np.random.default_rng(seed)
    category_ids = [category["id"] for category in ground_truth["categories"]]
    predictions = []
    for annotation in ground_truth["annotations"]:
        if generator.random() < 0.15:
            continue
        x, y, width, height = annotation["bbox"]
        noise = generator.normal(0, box_noise, 4) * [width, height, width, height]
        category = annotation["category_id"] if generator.random() < 0.9 else int(generator.choice(category_ids))
        box = np.maximum(np.array([x, y, width, height]) + noise, 0.5).tolist()
        score = float(generator.random())
        predictions.append({"image_id": annotation["image_id"], "category_id": category, "bbox": box, "score": score})
    for image in ground_truth["images"]:
        for _ in range(false_positives):
            box = generator.uniform(1, 150, 4).tolist()
            category, score = int(generator.choice(category_ids)), float(generator.random() * 0.5)
            predictions.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    return predictions


def as_predictions(annotations):
    fields = ("image_id", "category_id", "bbox")
    return [{field: annotation[field] for field in fields} | {"score": 0.9} for annotation in annotations]


@pytest.fixture
def ground_truth():
    """30 images: sparse category ids, crowd regions, mask areas below the boxes', images and a class without a box."""
    generator = np.random.default_rng(3)
    images = [{"id": 1000 - 7 * index, "width": 400, "height": 400} for index in range(30)]
    annotations = []
    for image in images[:-4]:
        for _ in range(int(generator.integers(1, 8))):
            x, y, width, height = generator.uniform(5, 190, 4).tolist()
            annotations.append(
                {
                    "id": 500 + 3 * len(annotations),
                    "image_id": image["id"],
                    "category_id": int(generator.choice([3, 17, 88])),
                    "bbox": [x, y, width, height],
                    "area": width * height * float(generator.uniform(0.1, 0.7)),
                    "iscrowd": int(generator.random() < 0.15),
                }
            )
    categories = [{"id": 88, "name": "kite"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
    categories.append({"id": 40, "name": "never seen"})
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def perfect_predictions(ground_truth):
    return as_predictions(annotation for annotation in ground_truth["annotations"] if not annotation["iscrowd"])


@pytest.fixture
def metric():
    return CocoAveragePrecision()


@pytest.fixture(scope="module")
def coco_mini_file(shared_data):
    return shared_data / "coco_mini" / "annotations" / "val.json"


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_on_the_untouched_file(ground_truth, metric, tmp_path, seed):
    """Guards against boxes' areas in place of annotated ones, counted crowd regions and skipped empty images."""
    annotation_file = tmp_path / "annotations.json"
    annotation_file.write_text(json.dumps(ground_truth), encoding="utf-8")
    predictions = perturbed_predictions(ground_truth, seed)
    expected = directly_by_pycocotools(annotation_file, predictions)
    assert len(expected) == 9 and 0.1 < expected["AP"] < 0.9

    for found in (
        coco_average_precision(ground_truth, predictions),
        metric.compute(predictions=predictions, ground_truth=ground_truth),
        metric.compute(predictions=predictions, ground_truth=annotation_file),
    ):
        assert {name: found[name] for name in NAMES} == pytest.approx(expected, abs=1e-12)


def tied_data(seed, classes=12):
    """A coarse grid of boxes and scores, so that both tie within and across images; every fifth image is empty."""
    generator = np.random.default_rng(seed)
    images = [{"id": 7 * index + 2, "width": 400, "height": 400} for index in range(40)]
    annotations, predictions = [], []
    for image in images:
        for _ in range(int(generator.integers(1, 9)) if image["id"] % 5 else 0):
            side = float(generator.choice([16, 32, 64, 96, 128]))
            box = [*(20.0 * generator.integers(0, 8, 2)).tolist(), side, side]
            crowd, area = int(generator.random() < 0.2), side * side * float(generator.choice([0.25, 1]))
            region = {"image_id": image["id"], "category_id": 3 * int(generator.integers(classes)), "bbox": box}
            annotations.append(region | {"id": len(annotations) + 1, "area": area, "iscrowd": crowd})
            for shift in 4.0 * generator.integers(0, 4, int(generator.integers(0, 4))):
                score = float(generator.integers(1, 5)) / 5
                predictions.append(region | {"bbox": [box[0] + shift, *box[1:]], "score": score})
        for _ in range(int(generator.choice([0, 15, 130]))):  # more than the 100 that count
            box = [*(20.0 * generator.integers(0, 8, 2)).tolist(), 32.0, 64.0]
            category, score = 3 * int(generator.integers(classes)), float(generator.integers(1, 5)) / 5
            predictions.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    categories = [{"id": 3 * index, "name": f"class {index}"} for index in range(classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, predictions


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def module(request, monkeypatch):
    """The module as it is imported with the extra, and without."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    spec = importlib.util.spec_from_file_location("either", METRIC_FILE.with_name("coco_average_precision.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.COCOeval_faster.__module__.startswith(request.param)
    return module


@pytest.mark.parametrize("seed", range(3))
def test_either_library_gives_pycocotools_figures(tmp_path, module, seed):
    """On ties of scores and boxes, crowd regions, all size ranges, images without anything and many classes."""
    ground_truth, predictions = tied_data(seed)
    annotation_file = tmp_path / "annotations.json"
    annotation_file.write_text(json.dumps(ground_truth), encoding="utf-8")
    for image_ids in (None, [image["id"] for image in ground_truth["images"][3:20]]):
        expected = directly_by_pycocotools(annotation_file, predictions, image_ids)
        found = module.coco_average_precision(ground_truth, predictions, image_ids)
        assert len(expected) == 9 and 0.03 < expected["AP"] < 0.95
        assert {name: found[name] for name in NAMES} == pytest.approx(expected, abs=1e-12)


def test_the_fixture_tells_the_mistakes_apart(ground_truth):
    """The comparison above could not fail if areas, crowd regions or empty images made no difference."""
    predictions = perturbed_predictions(ground_truth, 0)
    right = coco_average_precision(ground_truth, predictions)
    without_areas, without_crowd, without_empty = (copy.deepcopy(ground_truth) for _ in range(3))
    for annotation in without_areas["annotations"]:
        del annotation["area"]
    for annotation in without_crowd["annotations"]:
        annotation["iscrowd"] = 0
    empty_images = {image["id"] for image in ground_truth["images"][-4:]}
    without_empty["images"] = without_empty["images"][:-4]
    predictions_without_empty = [entry for entry in predictions if entry["image_id"] not in empty_images]
    assert coco_average_precision(without_areas, predictions)["AP_medium"] != pytest.approx(right["AP_medium"])
    assert coco_average_precision(without_crowd, predictions)["AP"] != pytest.approx(right["AP"])
    assert coco_average_precision(without_empty, predictions_without_empty)["AP"] != pytest.approx(right["AP"])


def test_equals_pycocotools_on_real_annotations(coco_mini_file):
    coco_mini = json.loads(coco_mini_file.read_text(encoding="utf-8"))
    predictions = perturbed_predictions(coco_mini, 0)
    found = coco_average_precision(coco_mini, predictions)
    expected = directly_by_pycocotools(coco_mini_file, predictions)
    assert {name: found[name] for name in NAMES} == pytest.approx(expected, abs=1e-12)
    assert 0.2 < found["AP"] < 0.8
    present = {annotation["category_id"] for annotation in coco_mini["annotations"]}
    names = {f"AP/{category['name']}" for category in coco_mini["categories"] if category["id"] in present}
    assert names == {name for name in found if name.startswith("AP/")}
    assert np.mean([found[name] for name in names]) == pytest.approx(found["AP"])


def test_image_ids_restrict_the_evaluation(ground_truth, tmp_path):
    annotation_file = tmp_path / "annotations.json"
    annotation_file.write_text(json.dumps(ground_truth), encoding="utf-8")
    predictions = perturbed_predictions(ground_truth, 1)
    image_ids = [image["id"] for image in ground_truth["images"][5:15]]
    found = coco_average_precision(ground_truth, predictions, image_ids)
    expected = directly_by_pycocotools(annotation_file, predictions, image_ids)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert found["AP"] != pytest.approx(coco_average_precision(ground_truth, predictions)["AP"])


def test_perfect_predictions_score_one_in_plain_floats(ground_truth, perfect_predictions):
    found = coco_average_precision(ground_truth, perfect_predictions)
    assert set(found) == {*NAMES, "AP/kite", "AP/car", "AP/cat"}  # "never seen" has no AP
    assert {type(value) for value in found.values()} == {float}
    assert {name: value for name, value in found.items() if name not in ("AR_1", "AR_10")} == pytest.approx(
        dict.fromkeys(set(found) - {"AR_1", "AR_10"}, 1.0)
    )


def test_each_class_has_its_own_value(ground_truth, perfect_predictions):
    """Guards against class names shifted against pycocotools' sorted category ids."""
    found = coco_average_precision(
        ground_truth, [entry for entry in perfect_predictions if entry["category_id"] == 17]
    )
    classes = {name: value for name, value in found.items() if name.startswith("AP/")}
    assert classes == pytest.approx({"AP/cat": 1.0, "AP/car": 0.0, "AP/kite": 0.0})
    assert found["AP"] == pytest.approx(1 / 3)


def test_worse_boxes_and_missed_images_lower_the_average_precision(ground_truth, perfect_predictions):
    values = []
    for shift in (0.0, 0.05, 0.15, 0.3):
        shifted = copy.deepcopy(perfect_predictions)
        for prediction in shifted:
            prediction["bbox"][0] += shift * prediction["bbox"][2]
        values.append(coco_average_precision(ground_truth, shifted)["AP"])
    assert all(better > worse + 0.05 for better, worse in zip(values, values[1:], strict=False))

    first_image = ground_truth["images"][0]["id"]
    missed = [prediction for prediction in perfect_predictions if prediction["image_id"] != first_image]
    assert coco_average_precision(ground_truth, missed)["AP"] < 1


def test_no_predictions_score_zero(ground_truth, metric):
    """`COCO.loadRes` raises IndexError on an empty list, as an untrained model may give."""
    for found in (coco_average_precision(ground_truth, []), metric.compute(predictions=[], ground_truth=ground_truth)):
        assert set(found) == {*NAMES, "AP/kite", "AP/car", "AP/cat"}
        assert set(found.values()) == {0.0}


def test_sparse_files_are_read_as_coco_means_them(ground_truth, perfect_predictions):
    """No `info`, areas, crowd flags or positive ids; pycocotools takes an annotation with id 0 as never found."""
    sparse = {key: copy.deepcopy(ground_truth[key]) for key in ("images", "annotations", "categories")}
    sparse["annotations"] = [entry for entry in sparse["annotations"] if not entry["iscrowd"]]
    new_ids = {image["id"]: index - 3 for index, image in enumerate(sparse["images"])}
    for image in sparse["images"]:
        image["id"] = new_ids[image["id"]]
    for index, annotation in enumerate(sparse["annotations"]):
        annotation.update(id=index, image_id=new_ids[annotation["image_id"]])
        del annotation["area"], annotation["iscrowd"]
    found = coco_average_precision(sparse, as_predictions(sparse["annotations"]))
    assert found["AP"] == found["AR_100"] == 1.0


def test_what_does_not_exist_is_left_out(ground_truth, perfect_predictions):
    large = [{**annotation, "area": 200.0**2, "iscrowd": 0} for annotation in ground_truth["annotations"]]
    found = coco_average_precision(ground_truth | {"annotations": large}, perfect_predictions)
    assert "AP_large" in found and "AP_small" not in found and "AP_medium" not in found

    with pytest.warns(UserWarning, match="no object that is not a crowd region"):
        assert coco_average_precision(ground_truth | {"annotations": []}, perfect_predictions) == {}


def test_arguments_are_left_as_they_were(ground_truth, metric):
    predictions = perturbed_predictions(ground_truth, 0)
    copies = copy.deepcopy((ground_truth, predictions))
    coco_average_precision(ground_truth, predictions)
    metric.compute(predictions=predictions, ground_truth=ground_truth)
    assert (ground_truth, predictions) == copies


def test_prints_nothing(ground_truth, perfect_predictions, capsys):
    coco_average_precision(ground_truth, perfect_predictions)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 4}, "prediction 2: image id 4 is not in"),
        ({"category_id": 5}, "prediction 2 .*category id 5 is not in"),
        ({"score": float("nan")}, "prediction 2 .*score nan"),
        ({"bbox": [1.0, float("inf"), 2.0, 2.0]}, "prediction 2 .*inf"),
        ({"bbox": [1.0, 2.0, 2.0]}, "prediction 2 .*four finite numbers"),
    ],
)
def test_wrong_predictions_are_named(ground_truth, perfect_predictions, metric, change, message):
    perfect_predictions[2] |= change
    with pytest.raises(ValueError, match=message):
        coco_average_precision(ground_truth, perfect_predictions)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=perfect_predictions, ground_truth=ground_truth)
    assert metric.compute(predictions=[], ground_truth=ground_truth)["AP"] == 0  # still usable afterwards


def test_wrong_ground_truth_is_named(ground_truth):
    images, categories = ground_truth["images"], ground_truth["categories"]
    with pytest.raises(ValueError, match="category name 'car' occurs 2 times"):
        coco_average_precision(ground_truth | {"categories": [*categories, {"id": 99, "name": "car"}]}, [])
    with pytest.raises(ValueError, match="`categories` are empty"):
        coco_average_precision(ground_truth | {"categories": []}, [])
    with pytest.raises(ValueError, match="image id 1000 occurs twice"):
        coco_average_precision(ground_truth | {"images": [*images, images[0]]}, [])
    with pytest.raises(ValueError, match="no image to evaluate"):
        coco_average_precision(ground_truth, [], image_ids=[])
    with pytest.raises(ValueError, match=r"1 of the `image_ids`.*\(first: 12\)"):
        coco_average_precision(ground_truth, [], image_ids=[1000, 12])


def test_annotations_of_unlisted_images_are_reported(ground_truth, perfect_predictions):
    first = ground_truth["images"][0]["id"]
    lost = [annotation["id"] for annotation in ground_truth["annotations"] if annotation["image_id"] == first]
    kept = [prediction for prediction in perfect_predictions if prediction["image_id"] != first]
    with pytest.warns(UserWarning, match=f"^{len(lost)} annotations .*first annotation ids: .{lost[0]}"):
        found = coco_average_precision(ground_truth | {"images": ground_truth["images"][1:]}, kept)
    assert found["AP"] == pytest.approx(1.0)


def test_evaluate_loads_the_file_offline_in_two_processes_at_once(ground_truth, tmp_path):
    """Guards against imports of the package in the file, a look at the Hub, and waits for the other's cache lock."""
    predictions = perturbed_predictions(ground_truth, 0)
    (tmp_path / "ground_truth.json").write_text(json.dumps(ground_truth), encoding="utf-8")
    (tmp_path / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    script = """
import json, multiprocessing, sys, evaluate

def load_and_compute(together, results):
    together.wait()
    metric = evaluate.load(sys.argv[1], keep_in_memory=True)
    predictions = json.load(open("predictions.json"))
    results.put([metric.compute(predictions=predictions, ground_truth="ground_truth.json")["AP"] for _ in range(3)])

fork = multiprocessing.get_context("fork")  # what is imported is imported once
together, results = fork.Barrier(2), fork.Queue()
both = [fork.Process(target=load_and_compute, args=(together, results)) for _ in range(2)]
for process in both:
    process.start()
print(json.dumps([results.get(timeout=60) for _ in both]))
for process in both:
    process.join()
    assert process.exitcode == 0
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(METRIC_FILE)]  # away from the package
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    expected = coco_average_precision(ground_truth, predictions)["AP"]
    for found in json.loads(process.stdout.splitlines()[-1]):
        assert found == pytest.approx([expected] * 3, abs=1e-12)
    assert not list((tmp_path / "cache").rglob("*.arrow*"))


def test_the_loaded_metric_is_this_one(metric):
    loaded = evaluate.load(str(METRIC_FILE))
    assert type(loaded).__name__ == "CocoAveragePrecision" and loaded.features == metric.features


def test_direct_construction_keeps_predictions_in_memory(ground_truth, tmp_path):
    metric = CocoAveragePrecision(cache_dir=str(tmp_path))
    metric.add_batch(predictions=perturbed_predictions(ground_truth, 0))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert metric.compute(ground_truth=ground_truth)["AP"] > 0.1
