"""Images without labels: nothing that reads ground truth acts on them, and what could learn nothing is refused."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import UnsupportedOptionError
from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.outputs import AUXILIARY, OWN, Queries
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.distillation_schedule import DistillationSchedule
from d3etr_hf.training.objective import D3etrObjective, Shares
from d3etr_hf.training.teacher import Teacher
from d3etr_hf.training.unlabeled import check_unlabeled
from tests.shapes_fixture import SIDE, load_shapes, shapes_trainer
from tests.tiny import padded_batch, random_labels, request_for, targets_of, tiny_model

LABELS = random_labels([3, 0, 2])
ALONE = Distillation(auxiliary_queries="none", adaptive_matching=False)
# of three images the second has no labels; a zero would be an image without objects
MIXED = replace(targets_of(LABELS), labeled=[True, False, True])
LABELED = [0, 2]


def shares_of(images: int, labeled: int) -> Shares:
    objects = torch.tensor(5.0)
    held = {OWN: objects, AUXILIARY: objects}
    return Shares(torch.tensor(float(images)), objects, held, lambda t: t, labeled=torch.tensor(float(labeled)))


@pytest.mark.parametrize("family", FAMILIES)
def test_detection_loss_is_that_of_the_labeled_images_alone(family):
    """Which go through the model without the other: in every family's own terms, proposals and groups included."""
    model, batch = tiny_model(seed=2, model_type=family), padded_batch(3)
    objective = D3etrObjective(ALONE, model.criterion())
    found = []
    with torch.no_grad():
        for targets, rows, labels in (
            (MIXED, [0, 1, 2], None),
            (targets_of([LABELS[n] for n in LABELED]), LABELED, 2),
        ):
            request = request_for()._replace(targets=targets)
            output = model(**{name: value[rows] for name, value in batch.items()}, request=request)
            terms, _ = objective(output, None, targets, shares_of(len(rows), labels or 2))
            found.append(terms)
    mixed, alone = found
    assert mixed.keys() == alone.keys() and sum(term.sum() for term in alone.values()) > 0
    for name, term in alone.items():
        torch.testing.assert_close(mixed[name], term, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_detection_loss_has_no_gradient_in_an_image_without_labels(family):
    """As in training, with what a family makes of ground truth (denoising); distillation has one."""
    model, teacher, batch = (tiny_model(2, family), tiny_model(1, family), padded_batch(3))
    said = Teacher(teacher, model.class_names, model.decoder_depth, None)(batch, request_for(maps=True), nullcontext)
    shared = Queries(said.queries.content, said.queries.position).detach()
    options = Distillation(self_attention_weight=0, cross_attention_weight=0)
    objective = D3etrObjective(options, model.criterion(), teacher.criterion())
    request = request_for({AUXILIARY: shared}, maps=True)._replace(targets=MIXED)
    output = model.train()(**batch, request=request)
    groups = output.groups | {name: part.group for name, part in (output.supervised or {}).items()}
    predictions = [part for group in groups.values() for part in (group.logits, group.boxes)]
    assignment = objective.start_teacher_assignment(said, MIXED)
    terms, _ = objective(output, said, MIXED, shares_of(3, 2), assignment)
    distilled = {name for name in terms if name.endswith("/prediction")}
    for names, acts in ((terms.keys() - distilled, False), (distilled, True)):
        loss = torch.stack([terms[name].sum() for name in names]).sum()
        gradients = torch.autograd.grad(loss, predictions, retain_graph=True, allow_unused=True)
        per_image = sum(each.abs().sum(dim=(0, 2, 3)) for each in gradients if each is not None)
        assert (per_image[LABELED] > 0).all() and bool(per_image[1] > 0) == acts


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 6, 2, image_size=SIDE, progress=False)


@pytest.mark.parametrize("family", ["detr", "rt_detr"])
def test_a_batch_without_a_label_is_distilled(shapes, tmp_path, family):
    """Where ground truth weighs classes, and where it makes denoising queries; nothing is divided by nothing."""
    data = load_shapes(shapes, "train", family=family)
    trainer = shapes_trainer(
        shapes,
        tmp_path,
        tiny_model(2, family),
        tiny_model(1, family),
        data.select([0]).with_unlabeled(data.select([1, 2, 3, 4, 5]), ratio=5),
        max_steps=3,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        log_instability=True,
    )
    assert trainer.num_examples(trainer.get_train_dataloader()) == 6 == trainer.instability.images
    trainer.train()
    first, *others = (log for log in trainer.state.log_history if "loss" in log)
    for log in others:
        missing = {name for name in first if name.startswith("loss/")} - log.keys()
        assert all("denoising" in name for name in missing)  # of no object no query is made
        for name, value in log.items():
            if name.startswith("loss/"):
                is_distilled = name.rpartition("/")[2] in ("self_attention", "cross_attention", "prediction")
                assert math.isfinite(value) and (value > 0) == is_distilled, name
    assert first["loss/student/class"] > 0 and first["loss/student/prediction"] > 0


def test_an_epoch_has_some_of_the_images_and_any_may_be_followed(shapes, tmp_path):
    """Of five without labels three come in an epoch, with one that has labels: a whole batch of four."""
    data = load_shapes(shapes, "train")
    train = data.select([0]).with_unlabeled(data.select([1, 2, 3, 4, 5]), ratio=3)
    trainer = shapes_trainer(shapes, tmp_path, train=train, log_instability=True, dataloader_drop_last=True)
    assert trainer.num_examples(trainer.get_train_dataloader()) == 4 and trainer.instability.images == 6


def test_accumulated_batches_equal_one_batch(shapes, tmp_path):
    """The second of them without a label; DETR's classes are divided by the labelled images of the whole step."""
    data = load_shapes(shapes, "train", family="detr")
    logs = []
    for size, accumulated in ((4, 1), (2, 2)):
        trainer = shapes_trainer(
            shapes,
            tmp_path / str(size),
            tiny_model(2, "detr"),
            tiny_model(1, "detr"),
            data.select([0]).with_unlabeled(data.select([1, 2, 3]), ratio=3),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        log = next(log for log in trainer.state.log_history if "loss" in log)
        logs.append({name: value for name, value in log.items() if name.startswith("loss") or name == "grad_norm"})
    whole, parts = logs
    assert parts == pytest.approx(whole, rel=1e-4) and whole["loss/student/class"] > 0


@pytest.mark.parametrize(
    ("changes", "has_teacher", "message"),
    [
        ({}, False, "there is none: give one"),
        ({"adaptive_matching": False, "auxiliary_queries": "none"}, True, "no distillation term is on"),
        ({"self_attention_weight": 0, "cross_attention_weight": 0, "prediction_weight": 0}, True, "no distillation"),
        ({"fgd_weight": 1.0}, True, "fgd_weight would read ground truth, .* set it to 0"),
        ({"clockdistill_memory_weight": 1.0}, True, "clockdistill_memory_weight would read ground truth"),
        ({"shared_query_weight": 1.0, "shared_object_queries": True}, True, "shared_object_queries would read"),
        ({"defeat_weight": 1.0}, True, "defeat_weight would read ground truth"),
        ({"detrdistill_memory_weight": 1.0}, True, "detrdistill_memory_weight would read ground truth"),
        ({"logits_distillation_weight": 1.0, "icd_weight": 1.0}, True, "logits_.*, icd_weight would .* set them to 0"),
    ],
)
def test_what_could_not_be_learned_is_refused(changes, has_teacher, message):
    with pytest.raises(UnsupportedOptionError, match=f"^unlabeled_images: .*{message}.* leave unlabeled_images out$"):
        check_unlabeled(Distillation(**changes), DistillationSchedule(), has_teacher)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"distillation_interval": 2}, "with distillation_interval=2: set it to 1"),
        ({"distillation_end": 0.5}, "with distillation_end=0.5: set it to 1"),
        ({"distillation_interval": 3, "distillation_end": 0.5, "distillation_decay": True}, "and .* set them to 1"),
        ({"distillation_decay": True}, None),
    ],
)
def test_steps_in_which_nothing_would_be_learned_are_refused(schedule, message):
    schedule = DistillationSchedule(**schedule)
    plain = [step for step in range(8) if not schedule.at(Distillation(), step, 8).follows_teacher]
    assert bool(plain) == (message is not None)
    refused = pytest.raises(UnsupportedOptionError, match=message) if plain else nullcontext()
    with refused:
        check_unlabeled(Distillation(), schedule)


@pytest.mark.parametrize("changes", [{"fitnet_weight": 1.0}, {"shared_query_weight": 1.0}])
def test_one_term_that_reads_no_ground_truth_is_enough(changes):
    check_unlabeled(Distillation(auxiliary_queries="none", adaptive_matching=False, **changes), DistillationSchedule())


def test_a_trainer_refuses_what_the_data_bring(shapes, tmp_path):
    """In Python there are no arguments that would be looked at before."""
    data = load_shapes(shapes, "train")
    with pytest.raises(UnsupportedOptionError, match="no distillation term is on"):
        shapes_trainer(
            shapes,
            tmp_path,
            train=data.select([0]).with_unlabeled(data.select([1]), 1),
            auxiliary_queries="none",
            adaptive_matching=False,
        )
