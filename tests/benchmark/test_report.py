"""The benchmark's figures, on sizes that take no time."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from scripts.benchmarking import memory, report, waiting
from scripts.benchmarking.growth import draw_growth, format_growth, growth_curves
from scripts.benchmarking.public_loop import compare_with_public_loop
from scripts.benchmarking.sizes import SIZES
from scripts.benchmarking.waiting import waiting_share

TINY = replace(SIZES["shapes"], batch=2, queries=5, layers=2, height=48, width=48)


def test_measurements_hold_what_they_promise(monkeypatch, shared_data):
    monkeypatch.setattr(report, "peak_memories", lambda *_: {name: 100.0 for name in report.STEPS} | {"step": 110.0})
    monkeypatch.setattr(
        report,
        "compare_with_public_loop",
        lambda *_: {
            "theirs": {"costs": 2.0},
            "ours": {"costs": 1.0},
            "public_loop_over_ours": 2.0,
            "assignment_speedup": 1.5,
        },
    )
    loop = shared_data.parent / "reference" / "public_loop.py"
    found = report.describe(TINY, "no") | report.measure_public_loop(loop) | report.measure_steps(TINY, "no", 2)
    found |= report.measure_parts(TINY, "no", 2, found)
    assert "peak memory" not in report.format_report(found)
    found |= report.measure_surroundings(TINY, "no", "nowhere", found, evaluation=False)
    for name in ("step_over_floor", "step_over_plain", "custom_forms_over_plain_forms", "matching_share"):
        assert found[name] > 0
    assert found["memory_over_two_groups"] == pytest.approx(1.1) and found["public_loop_over_ours"] == 2.0
    assert "waiting" not in found and json.loads(json.dumps(found)) == found
    text = report.format_report(found)
    assert "step over floor" in text and "assignment" in text and "over two groups 1.100" in text
    assert "step_plain_forms in one graph: yes" in text and "step_custom_forms in one graph: " in text


def test_floor_is_teacher_and_two_groups_of_the_same_round(monkeypatch):
    """Ratios are taken within a round: a busy moment then falls on both sides."""
    import numpy as np

    rounds = {"plain": [1, 10], "teacher": [1, 10], "two groups": [2, 20], "step": [3.3, 33]}
    rounds |= {"step_plain_forms": [4, 40], "step_custom_forms": [3, 30]}
    monkeypatch.setattr(report, "make_steps", lambda *_: {"step": None})
    monkeypatch.setattr(report, "interleaved", lambda *_, **__: {k: np.array(v, float) for k, v in rounds.items()})
    found = report.measure_steps(TINY, "no", 2)
    assert found["step_over_floor"] == pytest.approx(1.1) and found["step_over_plain"] == pytest.approx(3.3)
    assert found["custom_forms_over_plain_forms"] == pytest.approx(0.75)


def test_memory_is_measured_in_processes_of_their_own(monkeypatch):
    asked = []

    def process(command, **_):
        asked.append(json.loads(command[-1])["step"])
        return SimpleNamespace(returncode=0, stdout=f"noise\n{len(asked)}\n", stderr="")

    monkeypatch.setattr(memory.subprocess, "run", process)
    found = memory.peak_memories(TINY, "no")
    steps = {"imports": 1.0, "plain": 2.0, "teacher": 3.0, "two groups": 4.0, "step": 5.0}
    assert found == steps | {"step_custom_forms": 6.0}
    monkeypatch.setattr(
        memory.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr="no memory left")
    )
    with pytest.raises(RuntimeError, match="'imports'.*\n.*no memory left"):
        memory.peak_memories(TINY, "no")


def test_memory_process_takes_the_steps_it_is_asked_for(monkeypatch, capsys):
    taken = []

    def make_steps(size, precision, names):
        taken.append((names, precision, size))
        return {name: lambda name=name: taken.append(name) for name in names}

    monkeypatch.setattr(memory, "make_steps", make_steps)
    memory.main({"size": vars(TINY), "precision": "no", "step": "step"})
    assert taken == [(("step",), "no", TINY)] + ["step"] * memory.STEPS_TAKEN
    assert float(capsys.readouterr().out) == pytest.approx(memory.peak_memory(), rel=0.2)
    memory.main({"step": memory.IMPORTS})
    assert len(taken) == 1 + memory.STEPS_TAKEN


def test_both_sides_of_the_public_loop_compute_the_same(shared_data):
    sizes = {"L": 2, "B": 3, "N": 20, "C": 5, "K": 12}
    path = shared_data.parent / "reference" / "public_loop.py"
    found = compare_with_public_loop(path, torch.device("cpu"), rounds=1, sizes=sizes)
    assert found["difference"] < 1e-4 and found["public_loop_over_ours"] > 0 and found["assignment_speedup"] > 0


def test_growth_curves(tmp_path):
    curves = growth_curves(TINY, {"queries": (4, 8), "layers": (1, 2)}, rounds=1)
    assert curves["queries"]["values"] == [4, 8] and set(curves) == {"queries", "layers"}
    assert all(len(seconds) == 2 for seconds in curves["layers"]["seconds"].values())
    curves["queries"]["seconds"]["step"] = [1.0, 4.0]
    assert "| step | 1000.0 | 4000.0 |" in format_growth(curves)
    draw_growth(curves, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_exponent_is_the_slope_of_the_last_two_values(monkeypatch):
    from scripts.benchmarking import growth

    def fake_parts(size, precision, rounds):
        return [{"quadratic": size.queries**2 + 5.0, "constant": 1.0}]

    monkeypatch.setattr(growth, "step_parts", fake_parts)
    exponents = growth.growth_curves(TINY, {"queries": (10, 1000, 2000)}, rounds=1)["queries"]["exponents"]
    assert exponents["quadratic"] == pytest.approx(2, abs=1e-3) and exponents["constant"] == pytest.approx(0)


def test_waiting_for_real_images(shared_data, monkeypatch):
    load_splits = waiting.load_splits

    def few_images(*arguments):
        train, val = load_splits(*arguments)
        return train.select(range(6)), val  # three batches an epoch: the next one begins meanwhile

    monkeypatch.setattr(waiting, "load_splits", few_images)
    size = replace(TINY, queries=None, layers=None)
    found = waiting_share(size, str(shared_data / "bccd"), "no", workers=0, steps=2)
    assert 0 < found["share"] < 1 and found["wait"] > 0 and found["step"] > 0


def test_evaluation_that_is_timed_finds_objects(monkeypatch):
    """Detections that match nothing would make it look fast."""
    found = []
    original = waiting.coco_average_precision

    def spy(ground_truth, predictions):
        found.append((original(ground_truth, predictions), len(predictions)))
        return found[-1][0]

    monkeypatch.setattr(waiting, "coco_average_precision", spy)
    assert waiting.evaluation_seconds(classes=3, images=5) > 0
    ((metrics, detections),) = found
    assert 0.02 < metrics["AP"] < 0.98 and detections == 500
