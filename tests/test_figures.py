"""Figures in texts are those that were measured: README and help as RESULTS.md has them, and that as its files do."""

import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import permutations
from pathlib import Path
from statistics import mean, median, stdev

import pytest
from scipy import stats

import d3etr_hf
from d3etr_hf.cli.command_line import build_arguments
from d3etr_hf.configurations import read_yaml_file
from d3etr_hf.models.families import FAMILIES
from d3etr_hf.runs.comparison import Comparison
from d3etr_hf.runs.comparison_results import key_of, read_lines
from d3etr_hf.runs.planned_run import plan
from tests.markdown_tables import Table, figures, measured_paragraphs, tables

REPOSITORY = Path(__file__).resolve().parents[1]
CARDS = REPOSITORY / "model_cards"
README, RESULTS = ((folder / name).read_text() for folder, name in ((REPOSITORY, "README.md"), (CARDS, "RESULTS.md")))
# by what links call them
SECTIONS = {
    section.partition("\n")[0].lower().replace(" ", "-"): section for section in re.split(r"\n## ", RESULTS)[1:]
}
LINKED = {name: (CARDS / name).read_text() for name in re.findall(r"\(([\w/]+\.md)\)", RESULTS)}
PAIRS = "families/pairs/results.jsonl"
# what a measure is multiplied by, and its decimals
SCALES = {"AP": (100, 1), "AP50": (100, 1), "seconds": (1, 0), "steps": (1, 0)}
# what every option says of itself, by "module.Class.option"
HELP = {
    f"{module.name}.{name}.{field.name}": field.metadata["help"]
    for module in pkgutil.walk_packages(d3etr_hf.__path__, "d3etr_hf.")
    for name, kind in vars(import_module(module.name)).items()
    if is_dataclass(kind) and kind.__module__ == module.name
    for field in fields(kind)
    if "help" in field.metadata
}


def read(name: str) -> dict:
    return json.loads((CARDS / name).read_text())


def the_table(text: str, *columns: str, said: str = "") -> Table:
    """The one that has these columns and is introduced by these words."""
    (found,) = [each for each in tables(text) if set(columns) <= set(each.columns) and said in each.before]
    return found


def written(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """The mean over seeds and, of several, their deviation."""
    deviation = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{deviation}"


# the README and the help


def unfounded(paragraph: str) -> list[str]:
    """Figures of no section of RESULTS.md that the paragraph names, nor of a table that it and RESULTS.md link."""
    text = paragraph.replace("\n", " ")
    names = re.findall(r"RESULTS\.md#([\w-]+)", text)
    names += [name.lower().replace(" ", "-") for name in re.findall(r"RESULTS\.md, ([\w ]+)", text)]
    linked = [LINKED[name] for name in re.findall(r"\(model_cards/([\w/]+\.md)\)", text) if name in LINKED]
    known = {figure for each in (*(SECTIONS[name] for name in names), *linked) for figure in figures(each)}
    return [figure for figure in figures(paragraph) if figure not in known]


def test_the_readme_says_nothing_of_its_own():
    """Of average precision; its two tables of that are compared below."""
    said = measured_paragraphs(README)
    assert sum(len(figures(each)) for each in said) >= 9
    assert [figure for each in said for figure in unfounded(each)] == []
    assert len([table for table in tables(README) if re.search(r"\bAP", " ".join(table.columns))]) == 2


def test_first_table_of_the_readme():
    columns = ("parameters", "ms", "AP", "AP50")
    ours, theirs = the_table(README, *columns), the_table(RESULTS, *columns)
    by_name = {row[""]: row for row in ours.rows}, {row["model"]: row for row in theirs.rows}
    assert len(by_name[0]) == 4
    for name, row in by_name[0].items():
        assert [row[column] for column in columns] == [by_name[1][name][column] for column in columns], name


def test_families_of_the_readme():
    """All of them, as the comparison's table has them, without deviations."""
    measured = the_table(LINKED["families/results.md"], "alone", "distilled", said="AP (")
    by_family = {row["family"]: [row[mode].split(" ")[0] for mode in ("alone", "distilled", "teacher")]
                 for row in measured.rows}  # fmt: skip
    names = {family.title: name.replace("-", "_") for name, family in FAMILIES.items()}
    *_, column = (found := the_table(README, "family", "recipe")).columns
    said = {names[row["family"]]: figures(row[column]) for row in found.rows}
    assert said == by_family and len(said) == len(FAMILIES)
    other = {(line["family"], line["mode"]): f"{100 * line['AP']:.1f}" for line in read_lines(CARDS / PAIRS)}
    ((distilled, alone),) = re.findall(r"under D-FINE's the same student has (\S+) \(alone (\S+), one seed", README)
    assert (distilled, alone) == (other["d_fine→rt_detr", "distilled"], other["rt_detr", "alone"])


def wrong_help(text: str) -> list[str]:
    """Figures of average precision that the section of RESULTS.md which it names does not have."""
    return [figure for each in measured_paragraphs(text) for figure in unfounded(each)]


def test_help_says_nothing_of_its_own():
    assert len(HELP) > 150
    assert {name: found for name, text in HELP.items() if (found := wrong_help(text))} == {}
    known = the_table(RESULTS, "ms", "AP").rows[0]["AP"]
    assert wrong_help(f"AP rises to {known}.") == [known]
    said = f"AP rises to {known}, not to 12.3456 (model_cards/RESULTS.md, "
    assert wrong_help(said + "what it was worth).") == ["12.3456"]
    assert wrong_help(said + "with few labels).") == [known, "12.3456"]


# RESULTS.md


def test_the_demo():
    """As the cards of teacher and student have measured it."""
    card, teacher = read("shapes_student/metrics.json"), read("shapes_teacher/results.json")
    measured = card["compared"] | {"student, distilled": card["student"]}
    measured["teacher, ships with it"] = card["teacher"] | {name: teacher[name] for name in ("steps", "seconds")}
    found = the_table(RESULTS, "ms", "steps", "AP")
    assert {row["model"] for row in found.rows} == measured.keys()
    for row in found.rows:
        one = measured[row["model"]]
        timed = one if "milliseconds" in one else card["student"]
        assert row == {
            "model": row["model"],
            "parameters": f"{one['parameters']:,}",
            "ms": f"{timed['milliseconds']['median']:.1f}",
            "steps": f"{one['steps']:,}",
            "seconds": f"{one['seconds']:.0f}",
            "AP": f"{100 * one['metrics']['AP']:.1f}",
            "AP50": f"{100 * one['metrics']['AP50']:.1f}",
        }


def test_blood_cells():
    card = read("bccd_student/metrics.json")
    measured = [card["teacher"], *card["compared"].values(), card["student"]]
    (said,) = re.findall(r"The \[card\]\(bccd_student.*?\n\n", RESULTS, re.DOTALL)
    expected = [f"{100 * each['metrics'][measure]:.1f}" for measure in ("AP", "AP50") for each in measured]
    assert figures(said) == expected


def test_the_teacher_of_blood_cells():
    """That the comparison's students are taught by, as its own folder has measured it."""
    results, said = read("bccd_teacher/results.json"), SECTIONS["on-photographs"].replace("\n", " ")
    ap, ap50 = (f"{100 * results[name]:.1f}" for name in ("AP", "AP50"))
    assert f"a teacher of {results['parameters'] / 1e6:.2f} million parameters and AP {ap} (AP50 {ap50})" in said
    assert f"for {results['steps']} steps of 8" in said


def test_structure():
    """Where operations go, and what each decoder layer of the teacher is worth, as `d3etr analyze` wrote it."""
    parts = ("backbone", "encoder", "queries", "decoder", "heads")
    names = ("shapes_teacher", "conditional_detr_r50", "rt_detr_r50")
    analyses = [read(f"evidence/structure/{name}.json") for name in names]
    found = the_table(RESULTS, "image", *parts)
    assert [list(row.values())[1:] for row in found.rows] == [
        [
            f"{cost['height']}×{cost['width']}",
            f"{cost['parameters'] / 1e6:.2f}",
            f"{cost['flops'] / 1e9:.2f}",
            f"{cost['milliseconds']['median']:.0f}",
            *(f"{cost['parts'][part]['flops'] / cost['flops']:.0%}".replace("%", " %") for part in parts),
        ]
        for cost in (each["cost"] for each in analyses)
    ]
    shares = ("self_sink_mass", "cross_sink_mass", "cross_on_objects")
    layers = [
        [
            str(index),
            f"{100 * layer['AP']:.1f}",
            f"{100 * layer['AP50']:.1f}",
            *(f"{100 * layer[share]:.0f} %" for share in shares),
        ]
        for index, layer in enumerate(analyses[0]["layers"])
    ]
    assert [list(row.values()) for row in the_table(RESULTS, "layer", "on objects").rows] == layers


def test_instability():
    """At three steps, as the run has logged it; the teacher's assignment is the last layer's."""
    logged = {line["step"]: line for line in read("evidence/instability.json")}
    columns = [["adaptive/layer_0", "adaptive/layer_1"], ["own/layer_0", "own/layer_1"], ["auxiliary_own/layer_0"]]
    columns.append(["teacher_given/layer_1"])
    for row in the_table(RESULTS, "step").rows:
        shares = [[logged[int(row["step"])][f"instability/{name}"] for name in names] for names in columns]
        said = list(row.values())[1:]
        assert said == [" / ".join(f"{100 * share:.0f} %" for share in each) for each in shares]


def test_what_a_step_costs():
    found = the_table(RESULTS, "two cores, float32")
    _, *sizes = found.columns
    for column, name in zip(sizes, ("shapes", "real"), strict=True):
        measured = read(f"benchmark/{name}.json")
        seconds = [1000 * measured["seconds"][part]["median"] for part in ("plain", "teacher", "two groups", "step")]
        memory = [measured["memory"][part] for part in ("two groups", "step")]
        assert [row[column] for row in found.rows] == [
            " / ".join(f"{each:.0f}" for each in seconds),
            f"{measured['step_over_floor']:.2f}",
            f"{measured['step_over_plain']:.2f}",
            f"{100 * measured['matching_share']:.1f} %",
            " → ".join(f"{each:.0f}" for each in memory) + " MiB",
        ]


def test_a_step_of_every_family():
    found = the_table(RESULTS, "peak, MiB")
    said = {tuple(row.values())[1:] for row in found.rows}
    measured = read("families/steps.json").values()
    assert len(found.rows) == len(measured) and said == {
        (
            " / ".join(f"{each[part]:.1f}" for part in ("teacher", "two groups", "step")),
            f"{each['ratio']:.2f}",
            f"{each['MiB']:.0f}",
        )
        for each in measured
    }


# tables of `d3etr compare`: results.md is of results.jsonl; in RESULTS.md a section links the file of its tables


def runs_of(path: Path) -> dict[tuple[str, str], dict[int, dict]]:
    """By entry and mode the runs by seed; of one that was run again with other options the later."""
    runs: dict[tuple[str, str], dict[int, dict]] = {}
    for line in read_lines(path):
        runs.setdefault((line["family"], line["mode"]), {})[line["seed"]] = line
    return runs


def wrong_cells(table: Table, runs: dict[tuple[str, str], dict[int, dict]]) -> list[str]:
    """Cells that the runs do not say, of a table by entry with a column a mode, or a row a mode."""
    if "difference" in table.columns:
        return [text for row in table.rows for text in wrong_differences(row, table.before, runs)]
    wrong = []
    for row in table.rows:
        family = row.get("family") or next(iter(runs))[0]
        if "mode" in row:
            cells = {(row["mode"], measure): row[measure] for measure in SCALES if measure in row}
            wrong += wrong_comparison_cells(row, family, runs)
        else:
            measure = (
                re.search(r"\bAP50\b|\bAP\b|seconds|steps", table.before, re.IGNORECASE).group().replace("S", "s")
            )
            cells = {(mode, measure): row[mode] for mode in table.columns if mode not in ("family", "parameters")}
        for (mode, measure), said in cells.items():
            values = [run[measure] for _, run in sorted(runs.get((family, mode), {}).items())]
            # most comparisons train a teacher with their first seed alone
            measured = [written(of, *SCALES[measure]) for of in (values, values[:1]) if of] or ["—"]
            if re.sub(r" \(.*\)", "", said) not in measured[: 2 if mode == "teacher" else 1]:
                wrong.append(f"{family}, {mode}, {measure}: {said}, measured {measured[0]}")
    return wrong


def wrong_comparison_cells(
    row: dict[str, str], family: str, runs: dict[tuple[str, str], dict[int, dict]]
) -> list[str]:
    """Of a row a mode: how many seeds there are, the time of a step, and by how much it is ahead of a baseline."""
    ours = runs[family, row["mode"]]
    measured = {"seeds": str(len(ours))}
    if "ms a step" in row:
        measured["ms a step"] = f"{median(1000 * run['seconds'] / run['steps'] for run in ours.values()):.0f}"
    for column in row:
        if (baseline := re.fullmatch(r"AP minus ([\w.-]+)", column)) is not None:
            gains, is_baseline = gains_of(runs, family, row["mode"], baseline[1]), row["mode"] == baseline[1]
            measured[column] = "" if is_baseline else f"{mean(gains.values()):+.1f}"
            measured["95 % interval"] = "" if is_baseline else interval_of(gains)
    return [
        f"{family}, {row['mode']}, {column}: {row[column]}, measured {value}"
        for column, value in measured.items()
        if column in row and row[column].split(" of ")[0] != value
    ]


def gains_of(runs: dict[tuple[str, str], dict[int, dict]], family: str, mode: str, baseline: str) -> dict[int, float]:
    """AP (0..100) of a mode minus the baseline's of the same seed, by seed."""
    ours, theirs = runs[family, mode], runs[family, baseline]
    return {seed: 100 * (ours[seed]["AP"] - theirs[seed]["AP"]) for seed in sorted(ours) if seed in theirs}


def interval_of(gains: dict[int, float]) -> str:
    """The 95 % t-interval of the mean, of several seeds."""
    if len(gains) == 1:
        return "—"
    return " to ".join(f"{end:+.1f}" for end in stats.ttest_1samp(list(gains.values()), 0).confidence_interval(0.95))


def wrong_differences(row: dict[str, str], before: str, runs: dict[tuple[str, str], dict[int, dict]]) -> list[str]:
    """Of a row's AP from the baseline's of the same seed: each, their mean and its interval."""
    if "modes" in row:  # at equal seconds
        mode, baseline = row["modes"].split(" minus ")
    else:
        mode, (baseline,) = row["mode"], re.findall(r"AP minus AP ([\w.-]+),", before)
    found = gains_of(runs, row["family"], mode, baseline)
    by_seed = ", ".join(f"{each:+.1f} ({seed})" for seed, each in found.items())
    measured, said = [f"{mean(found.values()):+.1f}", by_seed, interval_of(found)], list(row.values())[2:]
    return [] if said == measured else [f"{said}, measured {measured}"]


def comparisons() -> Iterator[tuple[Comparison, Path]]:
    """Of all configurations of `d3etr compare` those that have been run, with their results."""
    for path in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        options = read_yaml_file(path)
        if isinstance(options, dict) and (results := REPOSITORY / str(options.get("results"))).exists():
            yield build_arguments((Comparison,), options, str(path))[0], results


def test_every_run_is_one_of_its_configuration(monkeypatch):
    """As that is now: who changes its options has results of something else."""
    monkeypatch.chdir(REPOSITORY)
    found = list(comparisons())
    assert len(found) >= 10
    for comparison, results in found:
        unplanned = {key_of(line) for line in read_lines(results)} - {run.key for run in plan(comparison)}
        assert not unplanned, results


REPORTS = [path for path in sorted(CARDS.rglob("*.md")) if path.with_suffix(".jsonl").exists()]


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.relative_to(CARDS).as_posix())
def test_comparison(report):
    runs = runs_of(report.with_suffix(".jsonl"))
    found = [table for table in tables(report.read_text()) if table.columns[0] == "family"]
    assert len(found) >= 2 and [wrong for table in found for wrong in wrong_cells(table, runs)] == []


def test_every_student_under_every_teacher():
    """One seed: AP minus AP alone, and AP."""
    runs = runs_of(CARDS / PAIRS)
    (found,) = [table for table in tables(LINKED["families/pairs/results.md"]) if "teacher" in table.columns[0]]
    teacher_of, *students = found.columns
    for row in found.rows:
        for student in students:
            pair = student if row[teacher_of] == student else f"{row[teacher_of]}→{student}"
            alone, distilled = (100 * runs[key][0]["AP"] for key in ((student, "alone"), (pair, "distilled")))
            assert row[student] == f"{distilled - alone:+.1f} (AP {distilled:.1f})"


def wrong_comparisons(results: str) -> list[str]:
    """What is wrong in the tables of comparisons that RESULTS.md holds, each under a link to its runs."""
    wrong = []
    for table in tables(results):
        if table.columns[0] not in ("family", "mode"):
            continue
        links = re.findall(r"\(([\w/]+\.jsonl)\)", table.section)
        wrong += wrong_cells(table, runs_of(CARDS / links[-1])) if links else [f"{table.columns}: no link to the runs"]
    return wrong


def test_comparisons_of_results():
    assert wrong_comparisons(RESULTS) == []


def intervals_of(runs: dict[tuple[str, str], dict[int, dict]]) -> set[tuple[float, float]]:
    """The 95 % intervals of every mode's AP minus every other's of its entry, where they have seeds in common."""
    found = set()
    for (family, mode), (other, baseline) in permutations(runs, 2):
        gains = gains_of(runs, family, mode, baseline) if other == family else {}
        if len(gains) > 1:
            found.add(tuple(map(float, interval_of(gains).split(" to "))))
    return found


def unfounded_intervals(results: str) -> list[str]:
    """Those in the sentences that no two modes have, of the runs that their section links."""
    wrong = []
    for section in re.split(r"\n(?=## )", results):
        said = re.findall(r"\(([+-]?\d+\.\d) to ([+-]?\d+\.\d)\b", section.replace("\n", " "))
        links = re.findall(r"\((evidence/\w+\.jsonl)\)", section)
        known = set().union(*(intervals_of(runs_of(CARDS / link)) for link in links))
        wrong += [f"{low} to {high}" for low, high in said if (float(low), float(high)) not in known]
    return wrong


def test_intervals_in_sentences_are_of_two_modes_of_the_section():
    assert unfounded_intervals(RESULTS) == []
    one = re.search(r"\(([+-]?\d+\.)\d to [+-]?\d+\.\d\b", RESULTS)
    assert len(unfounded_intervals(RESULTS.replace(one[0], f"({one[1]}0 to 99.9"))) >= 1


def test_a_changed_figure_is_found():
    """In each form that a comparison's table may have; without a link to its runs a table says nothing."""
    lines = """# Families\n\n[Runs](families/results.jsonl)\n\nAP:\n
| family | alone | **distilled** |\n|---|---|---|\n| detr | 3.4 ± 0.1 | 21.6 ± 0.5 |\n
AP minus AP alone, of the same seed:\n
| family | mode | difference | by seed | interval |\n|---|---|---|---|---|
| detr | distilled | +18.3 | +18.0 (0), +18.6 (1) | +14.2 to +22.4 |\n
| mode | family | seeds | AP50 | seconds | AP minus alone | 95 % interval |\n|---|---|---|---|---|---|---|
| distilled | table_transformer | 2 | 53.1 ± 2.5 | 125 ± 3 | +16.0 | +9.3 to +22.6 |
"""
    assert wrong_comparisons(lines) == []
    assert len(wrong_comparisons(lines.replace("results.jsonl", "results.png"))) == 3
    for said in ("3.4", "0.5", "+18.3", "+18.6", "+22.4", "former | 2", "53.1", "± 3", "+16.0", "+9.3"):
        other = said[:-1] + str((int(said[-1]) + 1) % 10)
        assert len(wrong_comparisons(lines.replace(said, other))) == 1, said
