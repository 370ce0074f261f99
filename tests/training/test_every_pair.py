"""One step of every family as a student of itself, of its neighbour in the table and of the first family, and back."""

import pytest
import torch

from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import random_labels, tiny_model

NAMES = list(FAMILIES)
PAIRS = sorted({(NAMES[place - shift], name) for place, name in enumerate(NAMES) for shift in (0, 1)})
PAIRS += [(NAMES[0], name) for name in NAMES[2:]] + [(name, NAMES[0]) for name in NAMES[1:-1]]


def examples(objects: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    return [
        {
            "pixel_values": torch.randn(3, 64, 64, generator=generator),
            "labels": label | {"orig_size": torch.tensor([64, 64])},
        }
        for label in random_labels(objects, seed=3)
    ]


def step(teacher: str, student: str, folder, objects=(3, 0), **options) -> tuple[dict, D3etrTrainer]:
    """The log of one step whose teacher is deeper and has more queries."""
    args = D3etrTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, log_each_layer=True, **options
    )
    models = {"model": tiny_model(1, student), "teacher": tiny_model(2, teacher, decoder_layers=4, num_queries=9)}
    trainer = D3etrTrainer(args=args, **models)
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples(list(objects))))
    loss.backward()
    trainer.log({"loss": float(loss.detach())})
    return trainer.state.log_history[-1], trainer


@pytest.mark.parametrize(("teacher", "student"), sorted(set(PAIRS)))
def test_a_step_has_every_term_and_reaches_every_parameter(teacher, student, tmp_path):
    log, trainer = step(teacher, student, tmp_path)
    for group in ("student", "auxiliary"):
        for term in ("class", "l1", "giou", "self_attention", "cross_attention", "prediction"):
            layers = [log[f"loss/{group}/{term}/layer_{layer}"] for layer in range(3)]
            assert all(torch.tensor(layers).isfinite()), (group, term)
            if term not in ("l1", "giou"):
                assert min(layers) > 0, (group, term)
    without = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("student", NAMES)
def test_a_step_of_the_teacherless_control_without_an_object(student, tmp_path):
    """Every parameter has a gradient all the same, or distributed processes would wait for each other."""
    log, trainer = step(NAMES[0], student, tmp_path, objects=(0, 0), auxiliary_queries="learned")
    assert torch.tensor(log["loss"]).isfinite()
    assert not [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ("rt_detr", "rt_detr", "places"),
        ("rt_detr", "lw_detr", "moments"),
        ("detr", "rt_detr", "moments"),
        ("detr", "conditional_detr", "grid"),
    ],
)
def test_what_can_be_compared_place_by_place_is(teacher, student, expected, tmp_path):
    """Unlike samplers and dense maps are compared by where they look, two dense maps cell by cell."""
    terms = []
    for space in ("auto", expected):
        log, _ = step(teacher, student, tmp_path, cross_attention_space=space)
        terms.append([log[f"loss/{group}/cross_attention"] for group in ("student", "auxiliary")])
    assert terms[0] == pytest.approx(terms[1], rel=1e-6)


@pytest.mark.parametrize("space", ["moments", "places"])
def test_cross_attention_is_compared_where_the_options_say(space, tmp_path):
    """Two samplers of one kind; the term is not that of the grid."""
    terms = []
    for chosen in ("grid", space):
        log, trainer = step("rt_detr", "rt_detr", tmp_path, cross_attention_space=chosen)
        terms.append([log[f"loss/{group}/cross_attention"] for group in ("student", "auxiliary")])
        offsets = trainer.model.model.decoder.layers[0].encoder_attn.sampling_offsets.weight
        assert offsets.grad.abs().sum() > 0
    assert all(0 < other != on_grid for on_grid, other in zip(*terms, strict=True))
