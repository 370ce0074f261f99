"""Losses and gradients against autograd through the public loop, in float64: every term, every input."""

import pytest
import torch

from d3etr_hf.losses import (
    cross_attention_distillation,
    pair_weights,
    prediction_distillation,
    self_attention_distillation,
)
from d3etr_hf.matching import AdaptiveMatcher
from d3etr_hf.models.group_attention import both_forms
from d3etr_hf.outputs import GroupOutput, SigmoidScores
from tests.slow_reference import public_loop_of, taught

LAYERS, IMAGES, HEADS, CLASSES, TOKENS = 3, 4, 2, 5, 12
TERMS = ("prediction", "self_attention", "cross_attention")


def random_leaves(queries: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(LAYERS, IMAGES, *shape, generator=generator, dtype=torch.float64)

    leaves = {
        "logits": normal(queries, CLASSES) - 2,
        "boxes": normal(queries, 4).sigmoid() * 0.5 + 0.1,
        "self_scores": 2 * normal(HEADS, queries, queries),
        "cross_scores": 2 * normal(HEADS, queries, TOKENS),
    }
    return {name: tensor.requires_grad_() for name, tensor in leaves.items()}


def losses_of_public_loop(public_loop, teacher, student):
    def outputs(leaves):
        return {
            "logits": leaves["logits"],
            "boxes": leaves["boxes"],
            "self_attn": leaves["self_scores"].softmax(-1),
            "cross_attn": leaves["cross_scores"].softmax(-1),
        }

    teacher = {name: tensor.detach() for name, tensor in outputs(teacher).items()}
    student = outputs(student)
    return public_loop.losses(teacher, student, public_loop.matching(teacher, student))


def losses_of_ours(teacher, student):
    def group(leaves, detach):
        def maps(scores):
            forms = (both_forms(layer * 1) for layer in scores.unbind())
            return tuple(form.detach() if detach else form for form in forms)

        return GroupOutput(
            logits=leaves["logits"].detach() if detach else leaves["logits"],
            boxes=leaves["boxes"].detach() if detach else leaves["boxes"],
            self_attention=maps(leaves["self_scores"]),
            cross_attention=maps(leaves["cross_scores"]),
        )

    teacher, student, scores = taught(group(teacher, True)), group(student, False), SigmoidScores()
    pairs = AdaptiveMatcher(scores)(teacher, student)
    weights = pair_weights(teacher.probabilities, pairs)
    mask = torch.ones(IMAGES, 3, 4, dtype=torch.bool)
    return {
        "prediction": prediction_distillation(teacher, student, pairs, scores, weights, weights.sum((1, 2))).sum(),
        "self_attention": self_attention_distillation(
            teacher.self_attention, student.self_attention, pairs, IMAGES
        ).sum(),
        "cross_attention": cross_attention_distillation(
            teacher.cross_attention, student.cross_attention, pairs, mask, mask, IMAGES
        ).sum(),
    }


@pytest.mark.parametrize(("teacher_queries", "student_queries"), [(7, 7), (5, 9)])
@pytest.mark.parametrize("term", TERMS)
def test_loss_and_gradient_equal_the_public_loop(shared_data, term, teacher_queries, student_queries):
    public_loop = public_loop_of(shared_data)
    teacher = random_leaves(teacher_queries, seed=1)
    found = []
    for losses in (losses_of_ours, lambda *leaves: losses_of_public_loop(public_loop, *leaves)):
        student = random_leaves(student_queries, seed=2)
        loss = losses(teacher, student)[term]
        gradients = torch.autograd.grad(loss, student.values(), allow_unused=True)
        found.append((loss.detach(), [torch.zeros(1) if g is None else g for g in gradients]))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert sum(gradient.abs().max() for gradient in our_gradients) > 1e-3
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        error = (our_gradient - their_gradient).abs().max()
        assert error <= 1e-6 * their_gradient.abs().max()
