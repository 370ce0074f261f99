import numpy as np
import pytest
import torch
from transformers import RTDetrImageProcessorPil

from d3etr_hf.data import DetectionCollator, DetectionTransform, find_coco_split, load_coco_split
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import EvaluationError
from d3etr_hf.evaluation import average_precision_of, select_detections, to_coco_detections
from d3etr_hf.evaluation.detections import EMPTY_ROW_SCORE
from d3etr_hf.outputs import SelectedScores, SigmoidScores, SoftmaxScores
from tests.shapes_fixture import crop_every_other

SCORES = SigmoidScores()


def detections_by_loop(logits, boxes, original_sizes, top_k):
    """Every (query, class) pair of every image in float64, written out and sorted."""
    images = []
    for image_logits, image_boxes, (height, width) in zip(logits, boxes, original_sizes.tolist(), strict=True):
        pairs = []
        for query_logits, (centre_x, centre_y, box_width, box_height) in zip(
            image_logits.double().tolist(), image_boxes.double().tolist(), strict=True
        ):
            for label, logit in enumerate(query_logits):
                x, y = (centre_x - box_width / 2) * width, (centre_y - box_height / 2) * height
                score = 1 / (1 + np.exp(-logit))
                pairs.append([x, y, box_width * width, box_height * height, score, label])
        images.append(sorted(pairs, key=lambda pair: -pair[4])[:top_k])
    return torch.tensor(images, dtype=torch.float32)


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator) * 3
    boxes = torch.rand(3, 7, 4, generator=generator)
    return logits, boxes, torch.tensor([[480, 640], [96, 96], [333, 500]])


@pytest.mark.parametrize("top_k", [1, 10, 35])
def test_selection_equals_a_loop_over_all_pairs(outputs, top_k):
    """Guards against swapped height and width, a wrong query for a class, and selection per query instead of pair."""
    detections = select_detections(SCORES, *outputs, top_k=top_k)
    assert detections.shape == (3, top_k, 6) and detections.dtype == torch.float32
    torch.testing.assert_close(detections, detections_by_loop(*outputs, top_k), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_scaled_in_float32(outputs, dtype):
    """In bfloat16 a position of 500 pixels has steps of 2 pixels, and labels above 256 cannot be written."""
    logits, boxes, original_sizes = outputs
    logits = torch.cat([logits - 20, torch.full((3, 7, 300), -30.0), logits], dim=2).to(dtype)
    boxes = boxes.to(dtype)
    detections = select_detections(SCORES, logits, boxes, original_sizes, top_k=20)
    exact = detections_by_loop(logits, boxes, original_sizes, 20)
    assert detections.dtype == torch.float32
    # Rounding makes equal logits; the order among those is free.
    torch.testing.assert_close(detections[..., 4], exact[..., 4], rtol=1e-5, atol=1e-6)
    for found, expected in zip(detections, exact, strict=True):
        distinct = [row for row in expected if (expected[:, 4] == row[4]).sum() == 1][:10]
        for row in distinct:
            assert (found - row).abs().amax(dim=1).min() < 1e-3
    assert detections[..., 5].min() >= 305


def test_saturated_scores_keep_the_order_of_their_logits():
    """sigmoid(30) and sigmoid(40) are both 1 in float32; ranking by score would lose the stronger one."""
    logits = torch.tensor([[[30.0, -5.0], [40.0, 35.0]]])
    detections = select_detections(SCORES, logits, torch.rand(1, 2, 4), torch.tensor([[10, 10]]), top_k=2)
    assert detections[0, :, 5].tolist() == [0, 1]
    assert detections[0, 0, 4] == 1


def test_fewer_pairs_than_rows_leave_no_detection(outputs):
    detections = select_detections(SCORES, *outputs, top_k=100)
    assert (detections[:, 35:, 4] == -1).all() and (detections[:, :35, 4] >= 0).all()
    results = to_coco_detections(detections, [5, 6, 7], [10, 20, 30, 40, 50])
    assert [sum(result["image_id"] == image_id for result in results) for image_id in (5, 6, 7)] == [35] * 3


@pytest.mark.parametrize("top_k", [3, 7, 20])
def test_softmax_queries_are_one_detection_each(outputs, top_k):
    """As DETR is evaluated: the likeliest class of every query, however likely it is that there is none."""
    logits, boxes, original_sizes = outputs
    detections = select_detections(SoftmaxScores(), logits, boxes, original_sizes, top_k)
    for image in range(3):
        height, width = original_sizes[image].tolist()
        rows = []
        for query_logits, box in zip(logits[image].double(), boxes[image].double().tolist(), strict=True):
            probabilities = (query_logits.exp() / query_logits.exp().sum()).tolist()[:-1]
            label = max(range(4), key=probabilities.__getitem__)
            x, y = (box[0] - box[2] / 2) * width, (box[1] - box[3] / 2) * height
            rows.append([x, y, box[2] * width, box[3] * height, probabilities[label], label])
        rows = sorted(rows, key=lambda row: -row[4])[:top_k]
        torch.testing.assert_close(detections[image, : len(rows)], torch.tensor(rows), rtol=1e-5, atol=1e-4)
        empty = torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0, 0.0])
        assert torch.equal(detections[image, len(rows) :], empty.expand(top_k - len(rows), 6))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("boxes", torch.rand(3, 6, 4), "boxes have shape"),
        ("original_sizes", torch.ones(2, 2, dtype=torch.int64), "original_sizes have shape"),
        ("top_k", 0, "top_k is 0"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(outputs, name, value, message):
    arguments = dict(zip(("logits", "boxes", "original_sizes"), outputs, strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        select_detections(SCORES, **arguments)


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_coco_format_holds_plain_numbers_and_the_files_category_ids(kind):
    rows = torch.tensor([[[1.5, 2, 3, 4, 0.25, 2], [0, 0, 5, 5, 0.5, 0]], [[7, 7, 1, 1, 1.0, 1], [0, 0, 0, 0, -1, 0]]])
    image_ids = torch.tensor([9, -4])
    if kind is np.ndarray:
        rows, image_ids = rows.numpy(), image_ids.numpy()
    results = to_coco_detections(rows, image_ids, [18, 3, 90])
    assert results == [
        {"image_id": 9, "category_id": 90, "bbox": [1.5, 2, 3, 4], "score": 0.25},
        {"image_id": 9, "category_id": 18, "bbox": [0, 0, 5, 5], "score": 0.5},
        {"image_id": -4, "category_id": 3, "bbox": [7, 7, 1, 1], "score": 1.0},
    ]
    for result in results:
        assert type(result["image_id"]) is type(result["category_id"]) is int
        assert {type(value) for value in (*result["bbox"], result["score"])} == {float}


@pytest.mark.parametrize(("field", "value"), [(4, torch.nan), (0, torch.nan), (2, torch.inf)])
def test_outputs_that_are_not_finite_name_their_image(outputs, field, value):
    """pycocotools takes NaN and returns a plausible AP."""
    detections = select_detections(SCORES, *outputs, top_k=5)
    detections[1, 3, field] = value
    with pytest.raises(ValueError, match="image id 22:.*not finite"):
        to_coco_detections(detections, [11, 22, 33], [1, 2, 3, 4, 5])


def test_a_model_that_diverged_does_not_pass_as_one_without_detections(outputs):
    logits, boxes, original_sizes = outputs
    logits[2, 4, 1] = torch.nan
    with pytest.raises(ValueError, match="image id 33:"):
        to_coco_detections(select_detections(SCORES, logits, boxes, original_sizes, 5), [11, 22, 33], [1, 2, 3, 4, 5])


def test_wrong_ids_are_refused(outputs):
    detections = select_detections(SCORES, *outputs, top_k=35)
    with pytest.raises(ValueError, match="image id 2 occurs more than once"):
        to_coco_detections(detections, [1, 2, 2], [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="for 2 image ids"):
        to_coco_detections(detections, [1, 2], [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="image id 1: labels range from 0 to 4, but there are 3 category ids"):
        to_coco_detections(detections, [1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize("scores", [SigmoidScores(), SoftmaxScores()], ids=["sigmoid", "softmax"])
def test_selected_classes_have_the_detections_they_have_among_all(scores):
    """So their average precision is the whole detector's: a query that is best at another class counts for none."""
    generator = torch.Generator().manual_seed(2)
    logits, boxes = 2 * torch.randn(2, 9, 5, generator=generator), torch.rand(2, 9, 4, generator=generator)
    sizes, index = torch.tensor([[48, 64], [30, 20]]), [2, 0]
    everything = select_detections(scores, logits, boxes, sizes)
    selected = select_detections(SelectedScores(scores, index), logits, boxes, sizes)
    for rows, chosen in zip(everything.tolist(), selected.tolist(), strict=True):
        expected = [[*row[:5], index.index(int(row[5]))] for row in rows if row[4] >= 0 and int(row[5]) in index]
        assert expected and [row for row in chosen if row[4] >= 0] == expected


def test_a_perfect_detector_of_squashed_images_has_an_ap_of_one(tmp_path):
    """Guards the way back to pixels where the two axes were scaled by factors of their own."""
    folder = make_shapes(tmp_path, 1, 12, image_size=64, progress=False)
    crop_every_other(folder, "val", 60, 37)
    squares = DetectionTransform(RTDetrImageProcessorPil(size={"height": 48, "width": 48}))
    dataset = load_coco_split(*find_coco_split(folder, "val")).with_transform(squares)
    batch = DetectionCollator()([dataset[index] for index in range(len(dataset))])
    assert len({tuple(label["orig_size"]) for label in batch["labels"]}) == 2
    # one query an object, sure of its class; those without an object are sure of nothing
    logits = torch.full((*batch["targets"].shape[:2], 3), -9.0)
    for image, label in enumerate(batch["labels"]):
        for query in range(label["objects"]):
            logits[image, query, int(batch["targets"][image, query, 0])] = 9.0
    sizes = torch.tensor([label["orig_size"] for label in batch["labels"]])
    detections = select_detections(SCORES, logits, batch["targets"][..., 1:], sizes)
    assert average_precision_of(detections, dataset)["AP"] == pytest.approx(1.0)
    swapped = select_detections(SCORES, logits, batch["targets"][..., 1:], sizes.flip(1))
    assert average_precision_of(swapped, dataset)["AP"] < 0.9


def test_an_image_that_was_not_evaluated_is_no_image_without_detections(tmp_path):
    """Told with numbers, where its objects would count as missed."""
    dataset = load_coco_split(*find_coco_split(make_shapes(tmp_path, 1, 4, image_size=64, progress=False), "val"))
    image_ids = dataset.rows["image_id"]
    nothing = torch.full((4, 1, 6), EMPTY_ROW_SCORE)
    assert average_precision_of(nothing, dataset, image_ids[::-1])["AP"] == 0
    with pytest.raises(
        EvaluationError, match=f"2 of the 4 images of .* not evaluated, the first with id {image_ids[1]}"
    ):
        average_precision_of(nothing[:2], dataset, torch.tensor([image_ids[0], image_ids[3]]))
