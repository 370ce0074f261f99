"""Each sentence and cell of a card says what the figures say."""

import copy

import pytest

from d3etr_hf.publishing import card_texts
from d3etr_hf.publishing.card import CardArguments, card_data, is_distilled, pictures_of, summary
from d3etr_hf.publishing.citations import BASELINES, D3ETR, GROUP_DETR, citations_for
from tests.publishing.test_card import FAMILY, OPTIONS


def model(ap, scores, parameters, flops, milliseconds, **more) -> dict:
    classes = {f"AP/{name}": value for name, value in zip(("cat", "dog", "fox"), scores, strict=True)}
    parts = {part: {"parameters": parameters // 4, "flops": flops // 4} for part in ("backbone", "encoder", "decoder")}
    times = {"median": milliseconds, "low": milliseconds - 1, "high": milliseconds + 2}
    return {
        "metrics": {"AP": ap, "AP50": 0.75, "AP_small": 0.123, "AR_100": 0.625, **classes},
        "parameters": parameters,
        "flops": flops,
        "parts": parts,
        "milliseconds": times,
        "height": 64,
        "width": 96,
        "family": FAMILY,
        **more,
    }


@pytest.fixture
def metrics() -> dict:
    """A student of half its teacher's size, and a control."""
    options = OPTIONS | {"layer_map": None}
    classes = {"cat": 50, "dog": 30, "fox": 20}
    return {
        "name": "student",
        "student": model(0.4, (0.6, 0.35, 0.25), 1000, 3_000_000, 5.0, steps=100, seconds=50.4, backbone="convnext"),
        "teacher": model(0.5, (0.7, 0.5, 0.3), 2000, 12_000_000, 20.0, steps=900, name="big", taught_at=[64, 96]),
        "compared": {"alone": {"metrics": {"AP": 0.304, "AP/cat": 0.5}, "parameters": 1000, "steps": 100}},
        "data": {
            "train": {"name": "x/train", "images": 10, "objects": 100, "classes": classes},
            "val": {
                "name": "x/val",
                "images": 4,
                "objects": 9,
                "classes": {"cat": 4, "dog": 3, "fox": 2},
                "sizes": {"small": 9, "medium": 0, "large": 0},
            },
        },
        "training": {
            "options": options,
            "inherited": [],
            "steps": 100,
            "seconds": 50.4,
            "seed": 3,
            "batch": {"per_device": 4, "accumulated": 2, "processes": 3},
            "batch_size": 24,
        },
        "links": {},
        "environment": {"device": "a machine", "threads": 2, "versions": {"torch": "1"}},
    }


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_highlights(metrics):
    first, second = card_texts.highlights(metrics)
    assert first == (
        "AP 40.0, 80% of its teacher's 50.0, with 50% of the teacher's parameters, 25% of its operations and "
        "25% of its time for an image."
    )
    assert second == "+9.6 AP against alone (AP 30.4, 100 steps)."


def test_teacher_of_another_size_is_said_so(metrics):
    metrics["teacher"] |= {"height": 128, "width": 192}
    assert "(the teacher at its own 128 × 192 pixels)" in card_texts.highlights(metrics)[0]


def test_results_table(metrics):
    header, _, teacher, alone, student = rows_of(card_texts.results_table(metrics))
    assert header == ["", "parameters", "training steps", "training seconds", "AP", "AP50", "S"]
    assert teacher == ["teacher", "0.00 M", "900", "", "50.0", "75.0", "12.3"]
    assert alone == ["alone", "0.00 M", "100", "", "30.4", "", ""]
    assert student == ["**this student**", "0.00 M", "100", "50", "40.0", "75.0", "12.3"]


def test_what_has_no_teacher_is_no_student(metrics):
    del metrics["teacher"]
    assert [row[0] for row in rows_of(card_texts.results_table(metrics))[2:]] == ["alone", "**this model**"]


def test_class_table(metrics):
    rows = rows_of(card_texts.class_table(metrics))
    assert rows[0][3:] == ["teacher", "alone", "**this student**"]
    assert rows[2] == ["cat", "50", "4", "70.0", "50.0", "60.0"]
    assert rows[4] == ["fox", "20", "2", "30.0", "", "25.0"]


def test_cost_table(metrics):
    rows = {row[0]: row[1:] for row in rows_of(card_texts.cost_table(metrics))}
    assert rows["parameters"] == ["2,000", "1,000"] and rows["GFLOPs"] == ["0.012", "0.003"]
    assert rows["milliseconds, median (quartiles)"] == ["20.0 (19.0–22.0)", "5.0 (4.0–7.0)"]
    assert rows["share of encoder: parameters / FLOPs"] == ["25% / 25%", "25% / 25%"]


def test_limitations(metrics):
    weak, furthest, recall, runs = card_texts.limitations(metrics)
    assert weak == (
        "Weakest classes: fox (AP 25.0, 20 training objects), dog (AP 35.0, 30 training objects); the mean over "
        "classes is 40.0."
    )
    assert furthest == "Furthest behind its teacher: dog, by 15.0 AP (35.0 against 50.0)."
    assert "62.5" in recall and "seed 3" in runs and "4 validation images" in runs


def test_training_table(metrics):
    rows = {row[0]: row[1] for row in rows_of(card_texts.training_table(metrics["training"]))}
    assert rows["images a step"] == "24 (4 per device × 3 processes × 2 accumulated)"
    assert rows["time of the training steps"] == "50 seconds"
    assert "layer_map" not in card_texts.option_table(metrics["training"])


@pytest.mark.parametrize(
    ("changes", "parts", "said"),
    [
        (
            {},
            ["self-attention", "cross-attention", "predictions"],
            "teacher's self-attention, cross-attention and predictions)",
        ),
        ({"self_attention_weight": 0, "cross_attention_weight": 0}, ["predictions"], "teacher's predictions)"),
        ({"adaptive_matching": False, "auxiliary_queries": "learned"}, [], None),
        ({"adaptive_matching": False, "fixed_matching": False}, [], None),
        (
            {"adaptive_matching": False, "fixed_matching": False, "shared_query_weight": 1.0},
            ["predictions"],
            "teacher's predictions)",
        ),
    ],
)
def test_only_what_was_distilled_is_said(metrics, tmp_path, changes, parts, said):
    """A control is not called distilled, and no attention is shown as transferred that was not."""
    metrics["training"]["options"] |= changes
    assert card_texts.learned_parts(metrics["training"]["options"]) == parts
    assert is_distilled(metrics) == bool(parts)
    text = summary(metrics, CardArguments())
    assert said in text if said else "distilled" not in text
    (tmp_path / "attention.png").touch()
    assert ("attention" in pictures_of(tmp_path, metrics)) == ("cross-attention" in parts)


def test_families_are_those_of_the_detectors(metrics):
    """Title, tag and citation of the student's; the teacher's is told where it is another."""
    other = {"title": "DETR", "tag": "detr", "citation": "@inproceedings{other}"}
    assert "A Conditional DETR object detector" in summary(metrics, CardArguments())
    assert "the teacher `big` by D³ETR" in summary(metrics, CardArguments())
    assert citations_for(metrics)[:2] == [D3ETR, "@inproceedings{own}"]
    assert len(citations_for(metrics)) == len({*citations_for(metrics)})  # nothing is cited twice
    metrics["teacher"]["family"] = other
    assert "the teacher `big`, a DETR, by D³ETR" in summary(metrics, CardArguments())
    assert citations_for(metrics)[:3] == [D3ETR, "@inproceedings{own}", "@inproceedings{other}"]
    metrics["student"]["family"] = other
    assert "A DETR object detector" in summary(metrics, CardArguments())
    assert card_data(metrics, CardArguments(), "name").tags[:2] == ["object-detection", "detr"]
    del metrics["teacher"]
    metrics["training"]["options"] |= {"auxiliary_queries": "learned", "adaptive_matching": False}
    assert citations_for(metrics)[:2] == ["@inproceedings{other}", GROUP_DETR]
    metrics["training"]["options"] |= {"shared_query_weight": 0.5, "logits_distillation_weight": 0.0}
    assert citations_for(metrics)[3] == BASELINES["shared_query_weight"]
    assert BASELINES["logits_distillation_weight"] not in citations_for(metrics)


def test_versions(metrics):
    assert card_texts.versions(metrics) == "Measured with torch 1."
    metrics["training"]["environment"] = copy.deepcopy(metrics["environment"])
    assert card_texts.versions(metrics) == "Trained and measured with torch 1."
    metrics["training"]["environment"]["versions"]["torch"] = "0"
    assert card_texts.versions(metrics) == "Trained with torch 0; measured with torch 1."


def test_every_kind_of_instability_is_told_of_its_queries():
    shares = {"adaptive": [0.1, 0.2], "own": [0.3, 0.4], "auxiliary_own": [0.5, 0.6], "teacher_given": [0.7, 0.8]}
    logged = {kind: {"steps": [90, 2000], "shares": values} for kind, values in shares.items()}
    told = card_texts.instability_note({"instability": logged}).partition("layers): ")[2]
    assert told.rstrip(".").split("; ") == [
        "of the teacher's in adaptive matching 10% at step 90 and 20% at step 2,000",
        "of the student's in its own label assignment 30% at step 90 and 40% at step 2,000",
        "of the auxiliary group's in its own label assignment 50% at step 90 and 60% at step 2,000",
        "of the auxiliary group's in the assignment that the teacher gives 70% at step 90 and 80% at step 2,000",
    ]
