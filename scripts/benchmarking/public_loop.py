"""Matching and losses of this package against those of a public-style loop over layers and images."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from d3etr_hf.evaluation.timing import seconds_of
from d3etr_hf.losses import (
    cross_attention_distillation,
    pair_weights,
    prediction_distillation,
    self_attention_distillation,
)
from d3etr_hf.matching import AdaptiveMatcher, MatchedPairs, Problem, TaughtGroup, solve
from d3etr_hf.matching.matching_cost import prediction_cost
from d3etr_hf.models.group_attention import both_forms
from d3etr_hf.outputs import GroupOutput, SigmoidScores

from .timing import timed_parts

MAPS = ("self_attn", "cross_attn")
SCORES, PAIR_WEIGHTS = SigmoidScores(), (1.0, 5.0, 2.0)
WORK = ("costs", "losses", "backward")
# layers, images, queries, classes and memory tokens
SIZES = {"L": 6, "B": 16, "N": 300, "C": 91, "K": 300}


def load_public_loop(path: Path) -> ModuleType:
    """The module at this path, with `matching`, `losses` and `random_outputs`."""
    specification = importlib.util.spec_from_file_location("public_loop", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def compare_with_public_loop(path: Path, device: torch.device, rounds: int = 3, sizes: dict | None = None) -> dict:
    """Seconds of both sides on the same random tensors, turn by turn, and how often ours fits into theirs.

    "work" is costs, losses and their backward pass, without the assignment. Both sides start from the same predictions
    and attention scores: the loop takes their softmax, ours both of its forms, and the backward passes end at them.

    Returns:
        Median seconds of each part, "theirs" and "ours" ("one by one" is scipy in a plain loop over our costs);
        `public_loop_over_ours`, of the work; `assignment_speedup`, of ours over one by one; and `difference`, the
        greatest relative difference of a loss.
    """
    sizes = SIZES if sizes is None else sizes
    public_loop = load_public_loop(path)
    teacher, student = (_scores(public_loop.random_outputs(seed=seed, **sizes), device) for seed in (0, 1))
    rows = []
    for _ in range(rounds + 1):
        theirs, their_losses = _their_round(public_loop, teacher, student)
        ours, our_losses = _our_round(teacher, student)
        difference = max(abs(our_losses[name] / value - 1) for name, value in their_losses.items())
        rows.append({"theirs": theirs, "ours": ours, "difference": difference})
    rows = rows[1:]  # the first one allocates
    parts = {
        side: {part: float(np.median([row[side][part] for row in rows])) for part in rows[0][side]}
        for side in ("theirs", "ours")
    }
    work = {side: sum(parts[side][part] for part in WORK) for side in parts}
    return {
        "sizes": sizes,
        **parts,
        "public_loop_over_ours": work["theirs"] / work["ours"],
        "assignment_speedup": parts["ours"]["one by one"] / parts["ours"]["assignment"],
        "difference": max(row["difference"] for row in rows),
    }


def _scores(outputs: dict, device: torch.device) -> dict:
    """Predictions, and scores whose softmax is the maps."""
    tensors = {name: tensor.detach().to(device) for name, tensor in outputs.items()}
    return tensors | {name: tensors[name].log() for name in MAPS}


def _their_round(public_loop: ModuleType, teacher: dict, student: dict) -> tuple[dict, dict]:
    kept = {}

    def with_maps(tensors: dict, requires_grad: bool) -> dict:
        leaves = {name: tensor.clone().requires_grad_(requires_grad) for name, tensor in tensors.items()}
        return leaves | {name: leaves[name].softmax(-1) for name in MAPS}

    maps = seconds_of(lambda: kept.update(teacher=with_maps(teacher, False), student=with_maps(student, True)))
    pair = kept["teacher"], kept["student"]
    with timed_parts({"assignment": [(public_loop, "linear_sum_assignment")]}) as inside:
        matching = seconds_of(lambda: kept.update(pairs=public_loop.matching(*pair)))
    losses = seconds_of(lambda: kept.update(losses=public_loop.losses(*pair, kept["pairs"])))
    backward = seconds_of(lambda: sum(kept["losses"].values()).backward())
    seconds = {"costs": matching - inside["assignment"], "losses": maps + losses, "backward": backward, **inside}
    return seconds, {name: value.item() for name, value in kept["losses"].items()}


def _our_round(teacher: dict, student: dict) -> tuple[dict, dict]:
    kept = {}
    # scores that a model has just computed may be overwritten: no leaves
    leaves = _leaves(teacher, False), _leaves(student, True)
    scores = [{name: [layer.clone() for layer in side[name]] for name in MAPS} for side in leaves]
    maps = seconds_of(lambda: kept.update(teacher=_taught(leaves[0], scores[0]), student=_group(leaves[1], scores[1])))
    teacher, student = kept.pop("teacher"), kept.pop("student")
    predictions = teacher.probabilities, teacher.boxes, student.logits, student.boxes
    costs = seconds_of(lambda: kept.update(cost=prediction_cost(*predictions, SCORES, PAIR_WEIGHTS).mT))
    assignment = seconds_of(lambda: solve(Problem(kept["cost"], "teacher to student")))
    matrices = kept.pop("cost").flatten(0, 1).cpu().numpy()
    one_by_one = seconds_of(lambda: [linear_sum_assignment(matrix) for matrix in matrices])
    matching = seconds_of(lambda: kept.update(pairs=AdaptiveMatcher(SCORES, *PAIR_WEIGHTS)(teacher, student)))
    losses = seconds_of(lambda: kept.update(losses=_losses(teacher, student, kept["pairs"])))
    backward = seconds_of(lambda: sum(value.sum() for value in kept["losses"].values()).backward())
    seconds = {
        "costs": max(costs, matching - assignment),  # with the making of the pairs
        "losses": maps + losses,
        "backward": backward,
        "assignment": assignment,
        "one by one": one_by_one,
    }
    return seconds, {name: value.sum().item() for name, value in kept["losses"].items()}


def _leaves(tensors: dict, requires_grad: bool) -> dict:
    leaves = {name: tensors[name].clone().requires_grad_(requires_grad) for name in ("logits", "boxes")}
    return leaves | {
        name: [layer.clone().requires_grad_(requires_grad) for layer in tensors[name].unbind()] for name in MAPS
    }


def _maps(scores: dict) -> dict:
    return {
        "self_attention": tuple(both_forms(layer) for layer in scores["self_attn"]),
        "cross_attention": tuple(both_forms(layer) for layer in scores["cross_attn"]),
    }


def _group(leaves: dict, scores: dict) -> GroupOutput:
    return GroupOutput(logits=leaves["logits"], boxes=leaves["boxes"], **_maps(scores))


def _taught(leaves: dict, scores: dict) -> TaughtGroup:
    return TaughtGroup(probabilities=SCORES.probabilities(leaves["logits"]), boxes=leaves["boxes"], **_maps(scores))


def _losses(teacher: TaughtGroup, student: GroupOutput, pairs: MatchedPairs) -> dict[str, torch.Tensor]:
    images, keys = teacher.boxes.shape[1], teacher.cross_attention[0].log.shape[-1]
    mask = torch.ones(images, 1, keys, dtype=torch.bool, device=pairs.teacher.device)
    weights = pair_weights(teacher.probabilities, pairs)
    return {
        "prediction": prediction_distillation(teacher, student, pairs, SCORES, weights, weights.sum((1, 2))),
        "self_attention": self_attention_distillation(teacher.self_attention, student.self_attention, pairs, images),
        "cross_attention": cross_attention_distillation(
            teacher.cross_attention, student.cross_attention, pairs, mask, mask, images
        ),
    }
