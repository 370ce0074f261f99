"""Box distributions through the trainer: between models whose bins differ, and refused where there are none."""

from dataclasses import replace

import pytest
import torch

from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.losses import box_distribution_distillation
from d3etr_hf.matching import MatchedPairs
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import tiny_model
from tests.training.test_every_pair import examples

BINS = {"max_num_bins": 16, "reg_scale": 8.0}
OFF = {f"{name}_weight": 0.0 for name in ("self_attention", "cross_attention", "prediction", "detection")}
TERMS = [f"loss/{group}/box_distribution" for group in ("student", "auxiliary")]


def step(folder, teacher, student, **options) -> tuple[dict, D3etrTrainer]:
    args = D3etrTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **options)
    trainer = D3etrTrainer(model=student, args=args, teacher=teacher)
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples([3, 2])))
    loss.backward()
    trainer.log({"loss": float(loss.detach())})
    return trainer.state.log_history[-1], trainer


@pytest.mark.parametrize("family", ["d_fine", "deimv2"])
def test_a_step_between_models_whose_bins_differ(family, tmp_path):
    teacher = tiny_model(1, "d_fine", decoder_layers=4, num_queries=9, **BINS)
    log, trainer = step(tmp_path, teacher, tiny_model(2, family), box_distribution_weight=2.0, **OFF)
    assert all(log[term] > 0 for term in TERMS)
    assert log["loss"] == pytest.approx(sum(log[term] for term in TERMS), rel=1e-5)
    half, _ = step(tmp_path, teacher, tiny_model(2, family), box_distribution_weight=1.0, **OFF)
    assert log["loss"] == pytest.approx(2 * half["loss"], rel=1e-5)
    for layer in range(3):
        assert trainer.model.bbox_embed[layer].layers[-1].bias.grad.abs().sum() > 0


@pytest.mark.parametrize(("seed", "nothing"), [(1, True), (3, False)], ids=["copy", "another"])
def test_the_auxiliary_group_of_a_copy_has_nothing_to_learn(seed, nothing, tmp_path):
    """In training its own batch's statistics would move the memory."""
    options = OFF | {"box_distribution_weight": 1.0, "adaptive_matching": False}
    args = D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
    trainer = D3etrTrainer(model=tiny_model(seed, "d_fine"), args=args, teacher=tiny_model(1, "d_fine"))
    loss = float(trainer.compute_loss(trainer.model.eval(), trainer.data_collator(examples([3, 2]))).detach())
    assert abs(loss) < 1e-3 if nothing else loss > 0.1


def test_layers_are_the_mapped_ones_and_scores_the_weights(tmp_path):
    """Whatever predictions are weighed by: most queries are of background, and their edges mean nothing."""
    options = OFF | {"box_distribution_weight": 1.0, "adaptive_matching": False, "layer_map": [0, 2, 3]}
    teacher, batch = tiny_model(1, "d_fine", decoder_layers=4), examples([3, 2])
    args = D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
    trainer = D3etrTrainer(model=tiny_model(3, "d_fine"), args=args, teacher=teacher)
    loss, student = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(batch), return_outputs=True)
    theirs = teacher(torch.stack([image["pixel_values"] for image in batch]), request=GroupRequest()).groups[OWN]
    assert args.prediction_normaliser == "pairs"
    expected, query = 0.0, torch.arange(7).expand(1, 2, 7)
    for layer, source in enumerate([0, 2, 3]):
        weights = theirs.logits[[source]].sigmoid().amax(-1)
        taught = replace(theirs, box_distribution=theirs.box_distribution[[source]])
        ours = student.groups[AUXILIARY]
        ours = replace(ours, box_distribution=ours.box_distribution[[layer]])
        pairs = MatchedPairs(query, query)
        expected += box_distribution_distillation(taught, ours, pairs, weights, weights.sum(dim=(1, 2)))
    torch.testing.assert_close(loss, expected.sum())


def test_off_by_default(tmp_path):
    log, _ = step(tmp_path, tiny_model(1, "d_fine"), tiny_model(2, "d_fine"))
    assert not [name for name in log if "box_distribution" in name]


@pytest.mark.parametrize(
    ("teacher", "student", "role"), [("rt_detr", "d_fine", "teacher"), ("d_fine", "detr", "student")]
)
def test_models_without_distributions_are_refused(teacher, student, role, tmp_path):
    with pytest.raises(IncompatibleTeacherError, match=f"box_distribution_weight=1.0: the {role}, a .* predicts no"):
        step(tmp_path, tiny_model(1, teacher), tiny_model(2, student), box_distribution_weight=1.0)
