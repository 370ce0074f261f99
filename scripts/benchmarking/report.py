"""Everything that scripts/benchmark.py measures of one size, as a dictionary and as text."""

import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import logging

from d3etr_hf.evaluation.timing import interleaved, spread
from d3etr_hf.matching.solver import assignment_threads

from .attention_forms import FORMS, why_not_compiled, with_forms
from .memory import peak_memories
from .public_loop import compare_with_public_loop
from .sizes import Size
from .steps import STEPS, make_steps, step_parts
from .waiting import COCO_TRAIN_IMAGES, evaluation_seconds, waiting_share

logger = logging.get_logger(__name__)

MATCHING = ("costs", "assignment", "matching, rest")


def measure_steps(size: Size, precision: str, rounds: int) -> dict:
    """Seconds of plain, teacher, two groups and step, and of the step with either form of attention maps, turn by
    turn; the ratios are medians over rounds."""
    steps = make_steps(size, precision)
    steps |= {name: with_forms(steps["step"], forms) for name, forms in FORMS.items()}
    seconds = interleaved(steps, rounds, title="steps")
    floor = seconds["teacher"] + seconds["two groups"]
    ratios = {
        "step_over_floor": seconds["step"] / floor,
        "step_over_plain": seconds["step"] / seconds["plain"],
        "custom_forms_over_plain_forms": seconds["step_custom_forms"] / seconds["step_plain_forms"],
    }
    return {
        **{name: spread(ratio)["median"] for name, ratio in ratios.items()},
        "spread": {name: spread(ratio) for name, ratio in ratios.items()},
        "seconds": {name: spread(values) for name, values in (seconds | {"floor": floor}).items()},
        "rounds": rounds,
    }


def measure_parts(size: Size, precision: str, rounds: int, found: dict) -> dict:
    """Seconds of a step's parts, of a third as many rounds, and matching's share of the step that `found` holds.

    Each part waits for the device at its end, so on an accelerator the whole is slower.
    """
    rows = step_parts(size, precision, max(3, rounds // 3))
    parts = {part: spread(np.array([row[part] for row in rows])) for part in rows[0]}
    # costs and assignments of both: teacher to student, and ground truth to queries
    matching = sum(parts[part]["median"] for part in MATCHING)
    return {"parts": parts, "matching_share": matching / found["seconds"]["step"]["median"]}


def describe(size: Size, precision: str) -> dict:
    """What is measured, and on what."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "assignment_threads": assignment_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"machine": machine, "size": vars(size) | {}, "precision": precision}


def measure_public_loop(path: Path) -> dict:
    """Costs and losses against a public-style loop; nothing, with a warning, where its file is not there."""
    if not path.exists():
        logger.warning(f"not compared with a public loop: there is no file {path}")
        return {}
    compared = compare_with_public_loop(path, torch.accelerator.current_accelerator() or torch.device("cpu"))
    return {"public_loop": compared, "public_loop_over_ours": compared["public_loop_over_ours"]}


def measure_surroundings(size: Size, precision: str, data_folder: str, found: dict, evaluation: bool) -> dict:
    """Peak memory, compiling, the wait for real images (with a warning where there are none) and COCO evaluation.

    Args:
        data_folder: a COCO-format folder of real images.
        found: what has been measured of the steps.
        evaluation: whether to time COCO average precision.
    """
    memory = peak_memories(size, precision)
    measured = {
        "not_compiled": {name: why_not_compiled(forms) for name, forms in FORMS.items()},
        "memory": memory,
        "memory_over_two_groups": memory["step"] / memory["two groups"],
    }
    if Path(data_folder).is_dir():
        measured["waiting"] = waiting_share(size, data_folder, precision)
    else:
        logger.warning(f"waiting for data is not measured: there is no folder {data_folder}")
    if evaluation:
        seconds = evaluation_seconds()
        epoch = COCO_TRAIN_IMAGES / size.batch * found["seconds"]["step"]["median"]
        measured["evaluation"] = {"seconds": seconds, "share_of_coco_epoch": seconds / (seconds + epoch)}
    return measured


def format_report(found: dict) -> str:
    """Markdown tables of what was measured."""
    text = ["| ms | median | quartiles |", "|---|---|---|"]
    for name in (*STEPS, "floor", *FORMS):
        text.append(f"| {name} | {_milliseconds(found['seconds'][name])} |")
    for name in ("step_over_floor", "step_over_plain", "custom_forms_over_plain_forms"):
        ratio = found["spread"][name]
        text.append(
            f"| {name.replace('_', ' ')} | {ratio['median']:.3f} | {ratio['low']:.3f} to {ratio['high']:.3f} |"
        )
    text += ["", "| part of a step, ms | median | quartiles |", "|---|---|---|"]
    text += [f"| {part} | {_milliseconds(seconds)} |" for part, seconds in found["parts"].items()]
    text += ["", f"matching: {found['matching_share']:.1%} of a step"]
    if "memory" in found:
        text += [f"{name} in one graph: {reason or 'yes'}" for name, reason in found["not_compiled"].items()]
        memory = ", ".join(f"{name} {value:.0f}" for name, value in found["memory"].items())
        text.append(f"peak memory, MiB: {memory}; step over two groups {found['memory_over_two_groups']:.3f}")
    if "public_loop" in found:
        for side in ("theirs", "ours"):
            parts = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in found["public_loop"][side].items())
            text.append(f"public loop, {side}, ms: {parts}")
        text.append(
            f"public loop over ours (costs, losses, backward): {found['public_loop_over_ours']:.1f}; "
            f"assignment, one by one over ours: {found['public_loop']['assignment_speedup']:.2f}"
        )
    if "waiting" in found:
        text.append(f"waiting for data: {found['waiting']['share']:.2%} of the training loop")
    if "evaluation" in found:
        evaluation = found["evaluation"]
        text.append(
            f"COCO AP of 5000 images x 100 detections: {evaluation['seconds']:.1f} s, "
            f"{evaluation['share_of_coco_epoch']:.3%} of an epoch of COCO at this size"
        )
    return "\n".join(text)


def _milliseconds(values: dict[str, float]) -> str:
    return f"{1e3 * values['median']:.1f} | {1e3 * values['low']:.1f} to {1e3 * values['high']:.1f}"
