"""Budgets: what is run, kept, summed up and drawn."""

import json

import pytest

from scripts.benchmarking import equal_time

LINES = [
    {"kind": kind, "seed": seed, "steps": steps, "seconds": 10.0 * steps, "AP": ap + 0.1 * seed, "AP50": 0.5}
    for kind, steps, ap in (("alone", 16, 0.2), ("distilled", 10, 0.4))
    for seed in (0, 1, 2)
]


@pytest.fixture
def calls(monkeypatch):
    made = []

    def train_one(name, command, folder):
        made.append((name, command))
        return {"seconds": 1.0, "AP": 0.5, "AP50": 0.6}

    monkeypatch.setattr(equal_time, "train_one", train_one)
    monkeypatch.setattr(equal_time, "make_shapes", lambda *_, **__: None)
    return made


def test_each_result_is_written_and_not_run_again(tmp_path, calls):
    results = tmp_path / "new" / "results.jsonl"
    arguments = (results, tmp_path, tmp_path / "data", [10, 20], [0, 1], 1.5)
    lines = equal_time.run_budgets(*arguments)
    assert len(lines) == 8 and equal_time.read_lines(results) == lines
    assert {(line["kind"], line["steps"]) for line in lines} == {
        ("distilled", 10), ("alone", 15), ("distilled", 20), ("alone", 30),
    }  # fmt: skip
    assert [name for name, _ in calls].count("strong_teacher") == 1 and len(calls) == 9
    kept = results.read_text().splitlines()[:-1]
    results.write_text("\n".join(kept) + "\n")
    equal_time.run_budgets(*arguments)
    assert len(calls) == 9 + 2 and len(equal_time.read_lines(results)) == 8  # the teacher says itself that it is done


def test_both_kinds_get_a_schedule_of_their_own_length(tmp_path, calls):
    equal_time.run_budgets(tmp_path / "results.jsonl", tmp_path, tmp_path / "data", [100], [7], 1.6)
    commands = {name: " ".join(command) for name, command in calls}
    assert "--seed 7 --max_steps 100 --warmup_steps 10" in commands["distilled_100_seed_7"]
    assert "--seed 7 --max_steps 160 --warmup_steps 16" in commands["alone_160_seed_7"]
    assert "--teacher" in commands["distilled_100_seed_7"] and "--teacher" not in commands["alone_160_seed_7"]


def test_summary_and_picture(tmp_path):
    rows = equal_time.summarise(LINES)
    distilled = next(row for row in rows if row["kind"] == "distilled")
    assert distilled["AP"] == pytest.approx(0.5) and distilled["AP_deviation"] == pytest.approx(0.1)
    assert distilled["seeds"] == 3 and distilled["seconds"] == 100
    text = equal_time.format_budgets(rows)
    assert "| distilled | 10 | 100 | 50.0 ± 10.0 | 50.0 | 3 |" in text
    equal_time.draw_budgets(LINES, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert equal_time.summarise(json.loads(json.dumps(LINES[:1])))[0]["AP_deviation"] == 0
