"""A teacher that must see other pixels than its student: its own, of the same image, and attention on one grid."""

import itertools

import pytest
import torch
from transformers import ConditionalDetrImageProcessorPil, RTDetrImageProcessorPil

from d3etr_hf.data import DataArguments, DetectionCollator, load_splits
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.matching import TaughtGroup
from d3etr_hf.outputs import AttentionMap, GroupRequest, Queries, SampledAttention
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.teacher import TeacherOutput
from tests.shapes_fixture import SIDE, crop_every_other, shapes_trainer
from tests.slow_reference import resampled_row
from tests.tiny import small_image_processor, tiny_model

HALF = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
PROCESSORS = {
    "other colours and size": ConditionalDetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80}, **HALF),
    "squares": RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE}),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Every second image is not square."""
    folder = make_shapes(tmp_path_factory.mktemp("shapes"), 8, 4, image_size=SIDE, progress=False)
    for split in ("train", "val"):
        crop_every_other(folder, split, 56, 40)
    return folder


def trainer_of(shapes, output, teacher_processor, given=True, **options) -> D3etrTrainer:
    """A trainer whose data have the teacher's pixels, unless it is not `given` to `load_splits`."""
    processor = small_image_processor(short_side=SIDE, long_side=SIDE)
    data = DataArguments(data_folder=str(shapes), augmentation="paper")
    train, val = load_splits(data, processor, teacher_processor if given else None)
    plain = shapes_trainer(shapes, output, train=train, **options)
    return D3etrTrainer(
        model=plain.model,
        args=plain.args,
        teacher=tiny_model(seed=1),
        teacher_processing_class=teacher_processor,
        train_dataset=train,
        eval_dataset=val,
        processing_class=processor,
    )


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_model_sees_its_own_pixels_and_learns(shapes, tmp_path, name):
    """In training only: evaluation asks the student alone."""
    trainer = trainer_of(shapes, tmp_path, PROCESSORS[name])
    examples = [trainer.train_dataset[index] for index in range(4)]
    batch = DetectionCollator()(examples)
    seen = {"student": [], "teacher": []}
    for role, model in (("student", trainer.model), ("teacher", trainer.teacher.detector)):
        model.register_forward_pre_hook(
            lambda module, inputs, kept, role=role: seen[role].append([*inputs, *kept.values()][:2]), with_kwargs=True
        )
    trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch))
    for role, prefix in (("student", ""), ("teacher", "teacher_")):
        ((pixels, mask),) = seen[role]
        assert pixels.equal(batch[f"{prefix}pixel_values"]) and mask.equal(batch[f"{prefix}pixel_mask"])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    moved = [not old.equal(new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(torch.tensor(entry["loss"]).isfinite() for entry in logs)
    calls = len(seen["teacher"])
    assert "eval_AP" in trainer.evaluate() and len(seen["teacher"]) == calls


def test_attention_of_the_teacher_is_compared_on_the_students_grid(shapes, tmp_path):
    """A square and a padded image may have grids of one size whose cells are of other places of the image."""
    trainer = trainer_of(shapes, tmp_path, PROCESSORS["squares"])
    objective, seen = trainer.objective, []
    trainer.objective = lambda student, teacher, *others: (
        seen.append((student, teacher)) or objective(student, teacher, *others)
    )
    trainer.objective.start_teacher_assignment = objective.start_teacher_assignment
    train = trainer.train_dataset
    transform = type(train.transform)(train.transform.image_processor, None, train.transform.teacher_processor)
    batch = DetectionCollator()([train.with_transform(transform)[index] for index in range(2)])
    assert batch["pixel_values"].shape == batch["teacher_pixel_values"].shape
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    ((student, teacher),) = seen
    own = trainer.teacher(
        {name: batch[f"teacher_{name}"] for name in ("pixel_values", "pixel_mask")},
        GroupRequest({}, cross_attention=True),
        torch.no_grad,
    )
    assert own.memory_mask.shape == student.memory_mask.shape and own.memory_mask.all()
    assert not student.memory_mask[1].all() and teacher.memory_mask.equal(student.memory_mask)
    found, theirs = teacher.group.cross_attention[0].probability, own.group.cross_attention[0].probability
    grids = [
        (*mask[1].shape, int(mask[1][:, 0].sum()), int(mask[1][0].sum()))
        for mask in (own.memory_mask, student.memory_mask)
    ]
    row = resampled_row(theirs[1, 0, 3].tolist(), *grids)
    torch.testing.assert_close(found[1, 0, 3], torch.tensor(row), atol=1e-5, rtol=1e-4)


def test_sampled_attention_needs_no_grid():
    """Its places are fractions of the image, whoever looks."""
    sampled = SampledAttention(torch.rand(1, 1, 2, 3, 2), torch.full((1, 1, 2, 3), 1 / 3))
    group = TaughtGroup(torch.rand(1, 1, 2, 3), torch.rand(1, 1, 2, 4), cross_attention=(sampled,))
    output = TeacherOutput(group, group, Queries(position=torch.zeros(2, 4)), torch.ones(1, 2, 2, dtype=torch.bool))
    moved = output.on_memory(torch.ones(1, 3, 5, dtype=torch.bool))
    assert moved.group.cross_attention[0] is sampled and moved.memory_mask.shape == (1, 3, 5)
    dense = AttentionMap(torch.zeros(1, 1, 2, 4).log(), torch.full((1, 1, 2, 4), 0.25))
    output = TeacherOutput(TaughtGroup(*itertools.repeat(None, 3), (dense,)), group, None, output.memory_mask)
    even = output.on_memory(torch.ones(1, 4, 1, dtype=torch.bool)).group.cross_attention[0].probability
    torch.testing.assert_close(even, torch.full((1, 1, 2, 4), 0.25))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "other colours and size",
            r"image_mean: the student's is \(0.485.*the teacher's \(0.5, 0.5, 0.5\); the",
        ),
        ("squares", "size: the student's is {'longest_edge': 64.*'height': 64.*load_splits"),
    ],
)
def test_data_without_the_teachers_pixels_are_refused(shapes, tmp_path, name, message):
    with pytest.raises(IncompatibleTeacherError, match=message):
        trainer_of(shapes, tmp_path, PROCESSORS[name], given=False)
    # nothing is asked of a teacher that no step runs
    off = {"auxiliary_queries": "none", "adaptive_matching": False}
    trainer_of(shapes, tmp_path, PROCESSORS[name], given=False, **off)


def test_one_tensor_serves_models_that_see_the_same(shapes):
    """A size that is given holds for both where they are sized alike; the teacher's own processor is left alone."""
    student, teacher = ConditionalDetrImageProcessorPil(), ConditionalDetrImageProcessorPil()
    teacher.size = {"shortest_edge": 400, "longest_edge": 600}
    given = DataArguments(data_folder=str(shapes), short_side=48, long_side=64)
    train, val = load_splits(given, student, teacher)
    assert "teacher_pixel_values" not in train[0] and dict(teacher.size) == {"shortest_edge": 400, "longest_edge": 600}
    # without a size each keeps its own, and other colours are other pixels
    train, val = load_splits(DataArguments(data_folder=str(shapes), augmentation="none"), student, teacher)
    assert train[0]["teacher_pixel_values"].shape == (3, 400, 400) and "teacher_pixel_values" not in val[0]
    student = ConditionalDetrImageProcessorPil()
    train, _ = load_splits(given, student, ConditionalDetrImageProcessorPil(image_mean=[0.5] * 3))
    assert train[0]["teacher_pixel_values"].shape == (3, 48, 48)
    # a short side says nothing to a teacher of squares
    train, _ = load_splits(given, student, PROCESSORS["squares"])
    assert train[0]["teacher_pixel_values"].shape == (3, SIDE, SIDE)
