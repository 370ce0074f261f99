"""A detector of no family as a teacher of predictions: YOLOS, which Transformers loads."""

import pytest
import torch
from transformers import DetrConfig, ViTConfig, ViTModel, YolosConfig, YolosForObjectDetection

from d3etr_hf.errors import DetectorLoadError, IncompatibleTeacherError
from d3etr_hf.models.loading import load_teacher
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.outputs import OWN, GroupRequest
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.teacher import with_classes_of
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import padded_batch, perturb, random_labels, tiny_model

NAMES = ["triangle", "dog", "circle", "rectangle"]


def yolos(names: list[str] = NAMES) -> YolosForObjectDetection:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    image = {"image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 9}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return perturb(YolosForObjectDetection(YolosConfig(**sizes, **image, **labels))).eval()


@pytest.fixture
def checkpoint(tmp_path) -> str:
    yolos().save_pretrained(tmp_path / "yolos")
    return str(tmp_path / "yolos")


def test_its_predictions_are_the_stock_models(checkpoint):
    teacher, pixels = load_teacher(checkpoint), padded_batch()["pixel_values"]
    group = teacher(pixels, None, request=GroupRequest()).groups[OWN]
    stock = yolos()(pixel_values=pixels)
    torch.testing.assert_close(group.logits, stock.logits[None], atol=1e-5, rtol=0)
    torch.testing.assert_close(group.boxes, stock.pred_boxes[None], atol=1e-5, rtol=0)
    softmax = teacher.criterion().scores.probabilities(group.logits)
    torch.testing.assert_close(softmax, stock.logits.softmax(-1)[None, ..., :-1], atol=1e-5, rtol=0)


def test_boxes_are_shares_of_the_image_not_of_the_padded_canvas(checkpoint):
    """By hand: the third image fills 40 of 64 columns and 48 of 64 rows."""
    teacher, batch = load_teacher(checkpoint), padded_batch(3)
    boxes = teacher(**batch, request=GroupRequest()).groups[OWN].boxes[0, 2]
    columns, rows = int(batch["pixel_mask"][2, 0].sum()), int(batch["pixel_mask"][2, :, 0].sum())
    assert columns < rows < 64
    stock = yolos()(pixel_values=batch["pixel_values"]).pred_boxes[2]
    pixels = stock * 64
    expected = torch.stack([pixels[:, 0] / columns, pixels[:, 1] / rows, pixels[:, 2] / columns, pixels[:, 3] / rows])
    torch.testing.assert_close(boxes, expected.T, atol=1e-5, rtol=0)


def test_classes_that_are_kept(checkpoint):
    teacher, pixels = load_teacher(checkpoint), padded_batch()["pixel_values"]
    logits = teacher(pixels, None, request=GroupRequest()).groups[OWN].logits
    reduced = with_classes_of(teacher, ["circle", "triangle"], "model")
    softmax = yolos()(pixel_values=pixels).logits.softmax(-1)
    torch.testing.assert_close(reduced.scores.probabilities(logits), softmax[None, ..., [2, 0]], atol=1e-5, rtol=0)
    assert reduced.class_names == ["circle", "triangle"] and teacher.class_names == NAMES


def trainer_of(teacher, folder, **options) -> D3etrTrainer:
    args = D3etrTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **options)
    return D3etrTrainer(model=tiny_model(), args=args, teacher=teacher)


def examples() -> list[dict]:
    labels = random_labels([2, 3])
    return [
        {"pixel_values": torch.randn(3, 64, 64), "labels": label | {"orig_size": torch.tensor([64, 64])}}
        for label in labels
    ]


def test_it_teaches_predictions_and_the_rest_is_left_out(checkpoint, tmp_path, caplog):
    trainer = trainer_of(load_teacher(checkpoint), tmp_path)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1
    assert all(word in said[0] for word in ("self_attention", "cross_attention", "auxiliary group"))
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples())).backward()
    trainer.log({"loss": 0.0})
    terms = {name for name in trainer.state.log_history[-1] if name.startswith("loss/")}
    assert terms == {f"loss/student/{name}" for name in ("class", "l1", "giou", "prediction")}
    assert trainer.state.log_history[-1]["loss/student/prediction"] > 0


def test_nothing_to_learn_from_it_is_refused(checkpoint, tmp_path):
    with pytest.raises(IncompatibleTeacherError, match="adaptive_matching"):
        trainer_of(load_teacher(checkpoint), tmp_path, adaptive_matching=False)


def test_what_cannot_teach_is_refused(tmp_path):
    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(DetectorLoadError, match="no detector in Transformers"):
        load_teacher(str(tmp_path / "vit"))
    model = yolos()
    model.class_labels_classifier.layers[-1] = torch.nn.Linear(32, 9)
    with pytest.raises(DetectorLoadError, match="9 outputs a query for 4 classes"):
        OtherDetector(model)
    model.forward = lambda pixel_values: DetrConfig()
    with pytest.raises(DetectorLoadError, match="gives no logits and pred_boxes"):
        OtherDetector(model)
