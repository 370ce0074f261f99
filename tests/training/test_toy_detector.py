"""A family that nothing but its own file knows of is trained, taught, saved, reloaded and evaluated."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForObjectDetection

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.loading import FAMILIES, load_detector
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from tests.shapes_fixture import SIDE, shapes_trainer, weights_of
from tests.tiny import padded_batch, request_for, tiny_model
from tests.toy_detector import ToyConfig, ToyDetector, ToyForObjectDetection, toy_model

BATCH = padded_batch()
TERMS = {"class", "l1", "giou"}
DISTILLED = TERMS | {"self_attention", "cross_attention", "prediction"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 12, 11, image_size=SIDE, progress=False)


@pytest.fixture(autouse=True)
def known_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy_detector", ToyDetector)
    AutoConfig.register("toy_detector", ToyConfig, exist_ok=True)
    AutoModelForObjectDetection.register(ToyConfig, ToyForObjectDetection, exist_ok=True)


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_it_shares_no_attribute_with_a_family():
    """Else what passes here could have read it."""
    ours = {name.split(".")[0] for name, _ in toy_model().named_parameters()} | set(vars(ToyConfig(slots=3)))
    ours -= set(vars(AutoConfig.for_model("bert")))  # what every configuration has
    for family in ("conditional_detr", "detr"):
        theirs = tiny_model(model_type=family)
        names = {name.split(".")[0] for name, _ in theirs.named_parameters()} | set(vars(theirs.config))
        assert not ours & (names - set(vars(AutoConfig.for_model("bert")))) - {"softmax"}


def test_it_keeps_the_promises_of_a_detector():
    model = toy_model()
    stock = model.to_stock()
    output = model(**BATCH, request=request_for(maps=True))
    torch.testing.assert_close(output.groups[OWN].logits[-1], stock(**BATCH).logits)
    again = model(**BATCH, request=request_for({AUXILIARY: output.queries}, maps=True)).groups
    for name in ("logits", "boxes"):
        torch.testing.assert_close(getattr(again[AUXILIARY], name), getattr(again[OWN], name))
        torch.testing.assert_close(getattr(again[OWN], name), getattr(output.groups[OWN], name))
    assert model.static_queries() is None and output.queries.content.shape == (2, 6, 16)
    assert not torch.equal(output.queries.anchors[0], output.queries.anchors[1])
    with torch.autocast("cpu", torch.bfloat16):
        group = model(**BATCH, request=GroupRequest()).groups[OWN]
    assert group.logits.dtype == group.boxes.dtype == torch.float32


# as student of its own kind (both softmax readings), and of a family with another kind of everything
@pytest.mark.parametrize(
    ("student", "teacher", "further"),
    [
        ({"softmax": False}, lambda: toy_model(1, softmax=True, channels=24, rounds=3, slots=8), {}),
        ({"softmax": True}, lambda: toy_model(1, channels=24), {"auxiliary_reference_points": "teacher"}),
        ({"softmax": True}, lambda: tiny_model(seed=1), {}),
        ({"softmax": False}, lambda: tiny_model(1, "detr"), {"prediction_normaliser": "boxes"}),
    ],
    ids=["of a softmax toy", "of a sigmoid toy", "of Conditional DETR", "of DETR"],
)
def test_it_is_taught_saved_reloaded_and_evaluated(shapes, tmp_path, student, teacher, further):
    options = {"max_steps": 16, "learning_rate": 3e-3, "backbone_learning_rate": 3e-3, "max_grad_norm": 1.0} | further
    trainer = shapes_trainer(shapes, tmp_path, student=toy_model(2, **student), teacher=teacher(), **options)
    before = weights_of(trainer.teacher.detector)
    trainer.train()
    logs = training_logs(trainer)
    terms = {name.removeprefix("loss/") for name in logs[0] if name.startswith("loss/")}
    expected = {f"{group}/{term}" for group in ("student", "auxiliary") for term in DISTILLED}
    assert terms == expected | {f"proposals/{term}" for term in TERMS}
    assert sum(logs[0][f"loss/{name}"] for name in terms) == pytest.approx(logs[0]["loss"], rel=1e-5)
    assert sum(entry["loss"] for entry in logs[-2:]) < 0.95 * sum(entry["loss"] for entry in logs[:2])
    assert torch.equal(weights_of(trainer.teacher.detector), before)
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    loaded = load_detector(str(tmp_path / "saved"))
    assert type(loaded) is ToyDetector
    trainer.model.eval()
    torch.testing.assert_close(loaded(**BATCH).logits, trainer.model(**BATCH).logits)
    stock = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
    assert type(stock) is ToyForObjectDetection
    torch.testing.assert_close(stock(**BATCH).pred_boxes, trainer.model(**BATCH).pred_boxes)
    again = shapes_trainer(shapes, tmp_path / "again", student=loaded, teacher=None)
    assert again.evaluate()["eval_AR_100"] == pytest.approx(metrics["eval_AR_100"])


@pytest.mark.parametrize("family", ["conditional_detr", "detr"])
def test_it_teaches_a_student_of_another_family(shapes, tmp_path, family):
    student = tiny_model(2, family)
    trainer = shapes_trainer(shapes, tmp_path, student=student, teacher=toy_model(1), max_steps=2)
    trainer.train()
    logs = training_logs(trainer)
    terms = {name for name in logs[0] if name.startswith("loss/")}
    assert terms == {f"loss/{group}/{term}" for group in ("student", "auxiliary") for term in DISTILLED}
    assert logs[1]["loss"] == logs[1]["loss"] and abs(logs[1]["loss"]) < 1e4


def test_anchors_of_an_image_stay_with_their_queries(shapes, tmp_path):
    """No head could make them of the queries afresh; points that a head made are made afresh by the student's."""
    for teacher, student, kept in (
        (toy_model(1), toy_model(2), True),
        (toy_model(1), tiny_model(2), True),
        (tiny_model(1), toy_model(2), True),
        (tiny_model(1), tiny_model(2), False),
    ):
        trainer = shapes_trainer(shapes, tmp_path, student=student, teacher=teacher)
        said = trainer.teacher(BATCH, GroupRequest(), trainer.accelerator.autocast)
        queries = trainer.queries.further(said)[AUXILIARY]
        assert (queries.anchors is not None) == kept
        if kept:
            assert torch.equal(queries.anchors, said.queries.anchors)


def test_queries_alone_are_read_of_a_teacher_whose_queries_depend_on_the_image(shapes, tmp_path):
    """No term and no assignment of the teacher's: it runs all the same."""
    off = {"adaptive_matching": False, "fixed_matching": False, "auxiliary_assignment": "own"}
    trainer = shapes_trainer(shapes, tmp_path, student=toy_model(2), teacher=toy_model(1), max_steps=1, **off)
    trainer.train()
    terms = {name for name in training_logs(trainer)[0] if name.startswith("loss/")}
    assert terms == {f"loss/{group}/{term}" for group in ("student", "auxiliary", "proposals") for term in TERMS}


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_gradient_is_finite_on_padded_images(shapes, tmp_path, divergence):
    """Its maps on the grid hold zeros on padding, whose logarithm must not reach back."""
    trainer = shapes_trainer(
        shapes, tmp_path, student=toy_model(2), teacher=tiny_model(1), attention_divergence=divergence
    )
    examples = [trainer.train_dataset[index] for index in range(3)]
    examples[1]["pixel_values"] = examples[1]["pixel_values"][:, :48, :40]
    batch = DetectionCollator()(examples)
    assert (batch["pixel_mask"] == 0).any()
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_learned_queries_learn_their_anchors(shapes, tmp_path):
    trainer = shapes_trainer(
        shapes, tmp_path, student=toy_model(2), teacher=None, auxiliary_queries="learned", max_steps=2
    )
    adapter = trainer.model.query_adapters[AUXILIARY]
    before = adapter(None).anchors.detach().clone()
    trainer.train()
    after = adapter(None).anchors.detach()
    assert before.shape == (6, 4) and (after - before).abs().max() > 0 and 0 <= after.min() <= after.max() <= 1
