"""Terms that compare encoder memories, from pixels to the log."""

from itertools import permutations

import pytest
import torch
from transformers import ConvNextConfig

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.losses import query_quality
from d3etr_hf.models.memory_methods import MEMORY_METHODS
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.outputs import AUXILIARY, NO_OBJECT, OWN, ComparedLevel, GroupRequest
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests import slow_memories
from tests.shapes_fixture import SIDE, weights_of
from tests.tiny import random_labels, targets_of, tiny_model
from tests.training.test_resuming import train

METHODS = list(MEMORY_METHODS)
ALL_ON = {f"{method}_weight": 1.0 for method in METHODS}
LABELS = random_labels([3, 0, 2], seed=3)
STRIDE_16 = ConvNextConfig(
    num_stages=3, hidden_sizes=[8, 16, 16], depths=[1] * 3, out_features=["stage3"], layer_scale_init_value=1.0
)
PADDED, SQUARE = [(64, 64), (48, 64), (64, 40)], [(64, 64)] * 3


def trainer_of(folder, student="conditional_detr", teacher="conditional_detr", teacher_changes=None, **options):
    args = D3etrTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **options)
    if isinstance(teacher, str):
        teacher = tiny_model(2, teacher, **(teacher_changes or {}))
    return D3etrTrainer(model=tiny_model(1, student), args=args, teacher=teacher)


def batch_of(trainer, sizes) -> dict:
    generator = torch.Generator().manual_seed(4)
    examples = [
        {
            "pixel_values": torch.randn(3, *size, generator=generator),
            "labels": label | {"orig_size": torch.tensor(size)},
        }
        for size, label in zip(sizes, LABELS, strict=True)
    ]
    return trainer.data_collator(examples)


def step(trainer, sizes=SQUARE) -> dict[str, float]:
    """The loss terms of one batch, after its backward pass."""
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer, sizes))
    loss.backward()
    trainer.log({"loss": float(loss.detach())})
    return {name: value for name, value in trainer.state.log_history[-1].items() if name.startswith("loss/")}


def both_memories(trainer, sizes):
    """What the models make of the batch, by themselves: outputs of student and teacher."""
    batch = batch_of(trainer, sizes)
    request = GroupRequest(memory=True, hidden_states=True)
    with torch.no_grad():
        return (
            model(batch["pixel_values"], batch["pixel_mask"], request=request)
            for model in (trainer.model.train(), trainer.teacher.detector)
        )


def on_grid_of(level, theirs) -> torch.Tensor:
    """A teacher's level resampled by a slow loop, `(B, d, H, W)`."""
    found = torch.zeros(len(level.mask), theirs.features.shape[1], *level.mask.shape[1:])
    for image in range(len(level.mask)):
        source, target = ((int(m[image, :, 0].sum()), int(m[image, 0].sum())) for m in (theirs.mask, level.mask))
        found[image, :, : target[0], : target[1]] = slow_memories.resampled_features(
            theirs.features[image].double(), source, target
        )
    return found


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "partners", "sizes"),
    [
        ("conditional_detr", "conditional_detr", {"d_model": 48}, [0], PADDED),
        ("detr", "deformable_detr", {}, [1], PADDED),
        ("rt_detr", "deformable_detr", {"d_model": 64}, [0, 1], SQUARE),
        ("deformable_detr", "rt_detr", {}, [0, 1, 1], SQUARE),
    ],
)
def test_fitnet_term_is_the_papers_of_what_the_encoders_give(student, teacher, changes, partners, sizes, tmp_path):
    """Other widths, other numbers of levels, padding; a weight of 3, the mean over levels."""
    trainer = trainer_of(tmp_path, student, teacher, changes, fitnet_weight=3.0)
    ours, theirs = both_memories(trainer, sizes)
    levels = []
    for index, (level, partner) in enumerate(zip(ours.memory, partners, strict=True)):
        projection = trainer.model.query_adapters["fitnet"].projections[index]
        matrix = projection.weight.detach()[..., 0, 0]
        carried = torch.einsum("ts,bshw->bthw", matrix, level.features) + projection.bias.detach()[:, None, None]
        levels.append(ComparedLevel(carried, on_grid_of(level, theirs.memory[partner]), level.mask))
    expected = 3.0 * sum(slow_memories.fitnet_loss(levels)) / len(levels)
    log = step(trainer, sizes)
    assert log["loss/memory/fitnet"] == pytest.approx(expected, rel=1e-4)
    assert all(p.grad.abs().sum() > 0 for p in trainer.model.query_adapters["fitnet"].parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_whether_it_reads_ground_truth(method, tmp_path, monkeypatch):
    """Images without labels may be among those of the others alone."""
    trainer = trainer_of(tmp_path, auxiliary_queries="none", **{f"{method}_weight": 2.0})
    before = step(trainer)[f"loss/memory/{method}"]
    monkeypatch.setitem(globals(), "LABELS", random_labels([1, 2, 3], seed=5))
    after = step(trainer)[f"loss/memory/{method}"]
    assert (after != before) == MEMORY_METHODS[method].reads_ground_truth


def best_assignment(teacher, output) -> torch.Tensor:
    """Of the teacher's last layer the object of each query, the cheapest of all assignments."""
    group, targets = output.groups[OWN], targets_of(LABELS)
    probabilities = teacher.criterion.scores.probabilities(group.logits[-1:])
    costs = teacher.criterion.problem(probabilities, group.boxes[-1:], targets, "teacher").cost[0]
    assignment = torch.full(costs.shape[:2], NO_OBJECT)
    for cost, count, row in zip(costs.tolist(), targets.counts, assignment, strict=True):
        orders = permutations(range(len(cost)), count)
        best = min(orders, key=lambda order: sum(cost[query][place] for place, query in enumerate(order)))
        row[list(best)] = torch.arange(count)
    return assignment


def test_every_term_is_what_its_loop_gives(tmp_path):
    """Of what encoders, decoders and adapters give; a teacher of another width and with another grid."""
    changes = {"d_model": 48, "backbone_config": STRIDE_16}
    trainer = trainer_of(tmp_path, teacher_changes=changes, **{name: 2.0 for name in ALL_ON})
    for parameter in trainer.model.query_adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours, theirs = both_memories(trainer, PADDED)
    level, teacher = ours.memory[0], trainer.teacher
    compared = [ComparedLevel(level.features, on_grid_of(level, theirs.memory[0]), level.mask)]
    targets, group = targets_of(LABELS), theirs.groups[OWN]
    with torch.no_grad():
        carried = {name: trainer.model.query_adapters[name](compared, targets) for name in METHODS if name != "icd"}
        queries = trainer.model.query_adapters["vidt"].carried_queries(ours.groups[OWN].hidden_states)
    probabilities = teacher.criterion.scores.probabilities(group.logits[-1])
    quality = query_quality(probabilities, group.boxes[-1], best_assignment(teacher, theirs), targets)
    expected = {
        "fitnet": slow_memories.fitnet_loss(carried["fitnet"]),
        "fgd": slow_memories.fgd_loss(carried["fgd"], targets),
        "defeat": slow_memories.defeat_loss(carried["defeat"], targets),
        "clockdistill_memory": slow_memories.clockdistill_loss(carried["clockdistill_memory"], targets),
        "detrdistill_memory": slow_memories.detrdistill_loss(
            carried["detrdistill_memory"], group.hidden_states, quality
        ),
        "vidt": slow_memories.vidt_loss(carried["vidt"], group.hidden_states, queries),
    }
    log = step(trainer, PADDED)
    # ICD's instances are drawn afresh each time
    assert (
        {name.removeprefix("loss/memory/") for name in log if "/memory/" in name} == {*expected, "icd"} == set(METHODS)
    )
    for name, (value,) in expected.items():
        assert log[f"loss/memory/{name}"] == pytest.approx(2.0 * value, rel=1e-4), name


def test_other_terms_are_the_same_bit_by_bit(tmp_path):
    """As without any of these methods."""
    plain, more = step(trainer_of(tmp_path), PADDED), step(trainer_of(tmp_path, **ALL_ON), PADDED)
    assert {name for name in more if name not in plain} == {f"loss/memory/{method}" for method in METHODS}
    assert {name: more[name] for name in plain} == plain and len(plain) == 12


def test_adapters_are_there_only_where_asked_for(tmp_path):
    trainer = trainer_of(tmp_path)
    assert set(trainer.model.query_adapters) == {AUXILIARY}
    trainer = trainer_of(tmp_path, teacher_changes={"d_model": 48}, **ALL_ON)
    assert set(trainer.model.query_adapters) == {AUXILIARY, *METHODS}
    assert not any("query_adapters" in name for name in trainer.model.to_stock().state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_alone_trains_the_encoder(method, tmp_path):
    """Without detection loss and decoder distillation, for which a teacher is needed all the same."""
    off = dict.fromkeys(("self_attention_weight", "cross_attention_weight", "prediction_weight"), 0.0)
    options = off | {"auxiliary_queries": "none", "detection_weight": 0.0, f"{method}_weight": 1.0}
    trainer = trainer_of(tmp_path, "rt_detr", "detr", **options)
    log = step(trainer)
    assert set(log) == {f"loss/memory/{method}"} and log[f"loss/memory/{method}"] > 0
    encoder = [p.grad for name, p in trainer.model.named_parameters() if trainer.model.role_of(name) == "encoder"]
    assert sum(float(gradient.abs().sum()) for gradient in encoder if gradient is not None) > 0
    without = [name for name, p in trainer.model.query_adapters.named_parameters() if p.grad is None]
    assert not without
    with pytest.raises(IncompatibleTeacherError, match="none was given"):
        trainer_of(tmp_path, teacher=None, **options)


def test_a_run_that_is_resumed_goes_on_bit_by_bit(tmp_path):
    """What adapters have learned is kept beside the checkpoint, and by the optimizer."""
    shapes = make_shapes(tmp_path / "shapes", 4, 1, image_size=SIDE, progress=False)
    whole = train(shapes, tmp_path / "whole", 2, **ALL_ON)
    train(shapes, tmp_path / "killed", 2, stop=1, **ALL_ON)
    resumed = train(shapes, tmp_path / "killed", 2, resume=str(tmp_path / "killed" / "checkpoint-1"), **ALL_ON)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    fresh = tiny_model(seed=2, dropout=0.1)
    assert len(weights_of(whole.model)) > len(weights_of(fresh))


def test_token_matching_needs_as_many_queries(tmp_path):
    with pytest.raises(IncompatibleTeacherError, match="vidt_weight=0.5.*the teacher has 9, the student 7"):
        trainer_of(tmp_path, teacher_changes={"num_queries": 9}, vidt_weight=0.5)


def test_a_teacher_of_predictions_alone_is_refused(tmp_path):
    teacher = OtherDetector(tiny_model(2, "detr").to_stock())
    with pytest.raises(IncompatibleTeacherError, match="fitnet_weight.*has predictions only, and no encoder memory"):
        trainer_of(tmp_path, teacher=teacher, fitnet_weight=1.0)
