"""The runs of a comparison: which, in which order, where, and what makes one another run."""

from pathlib import Path

import pytest

from d3etr_hf.runs.planned_run import fingerprint, plan
from tests.runs.test_comparison import LONGER, NO_TEACHER, TRAINED, comparison, two


def names(**changes) -> list[str]:
    return [run.name for run in plan(comparison(**changes))]


def test_a_seed_is_whole_before_the_next_begins():
    """A teacher comes first in its entry, and is trained once for all seeds."""
    assert names(seeds=[0, 1]) == [
        "first teacher seed 0",
        "first alone seed 0",
        "first teacherless seed 0",
        "first distilled seed 0",
        "second teacher seed 0",
        "second alone seed 0",
        "second teacherless seed 0",
        "second distilled seed 0",
        "first alone seed 1",
        "first teacherless seed 1",
        "first distilled seed 1",
        "second alone seed 1",
        "second teacherless seed 1",
        "second distilled seed 1",
    ]


def test_a_teacher_for_every_seed():
    runs = plan(comparison(entries={"a": TRAINED}, modes=["distilled"], seeds=[3, 5], teacher_seeds=[5, 3]))
    assert [run.name for run in runs] == [
        "a teacher seed 3",
        "a distilled seed 3",
        "a teacher seed 5",
        "a distilled seed 5",
    ]
    assert [run.waits_for for run in runs] == [None, runs[0], None, runs[2]]
    assert [run.options["seed"] for run in runs] == [3, 3, 5, 5]


def test_teachers_that_nobody_needs_are_not_trained():
    assert names(modes=["alone"]) == ["first alone seed 0", "second alone seed 0"]
    borrowed = two(second=NO_TEACHER | {"teacher": {"entry": "first"}})
    assert names(entries=borrowed, modes=["distilled"]) == [
        "first teacher seed 0",
        "first distilled seed 0",
        "second distilled seed 0",
    ]
    checkpoint = {"a": NO_TEACHER | {"teacher": "user/teacher"}}
    (run,) = plan(comparison(entries=checkpoint, modes=["distilled"]))
    assert run.options["teacher"] == "user/teacher" and run.waits_for is None and run.taught_by == "a"


def test_pairs_share_the_teachers_and_the_students_alone():
    """2 × 2: two teachers, two students alone, four distilled."""
    pairs = {"teachers": ["first", "second"], "students": ["first", "second"]}
    runs = {run.name: run for run in plan(comparison(modes=["alone"], pairs=pairs))}
    assert list(runs) == [
        "first teacher seed 0",
        "first alone seed 0",
        "second teacher seed 0",
        "second alone seed 0",
        "first distilled seed 0",
        "second→first distilled seed 0",
        "first→second distilled seed 0",
        "second distilled seed 0",
    ]
    crossed = runs["second→first distilled seed 0"]
    assert crossed.waits_for is runs["second teacher seed 0"] and crossed.taught_by == "second"
    assert crossed.folder.parts[:2] == ("runs", "first") and "from_second" in crossed.folder.name


def test_commands_and_their_options():
    made = comparison(entries={"a": TRAINED}, shared={"learning_rate": 1e-3})
    teacher, alone, _, distilled = plan(made)
    assert (teacher.command, alone.command, distilled.command) == ("train", "distill", "distill")
    assert teacher.options == {
        "learning_rate": 1e-3,
        "max_steps": 9,
        "seed": 0,
        "output_dir": f"runs/a/teacher_seed_0_{teacher.fingerprint}",
    }
    assert alone.options == {
        "learning_rate": 1e-3,
        "max_steps": 3,
        "auxiliary_queries": "none",
        "adaptive_matching": False,
        "seed": 0,
        "output_dir": f"runs/a/alone_seed_0_{alone.fingerprint}",
    }
    assert distilled.options["teacher"] == str(teacher.folder) and distilled.waits_for is teacher
    assert alone.waits_for is None and alone.taught_by is None
    assert distilled.configuration == Path(f"runs/a/distilled_seed_0_{distilled.fingerprint}.yaml")
    assert len({run.folder for run in plan(comparison(seeds=[0, 1]))}) == 14


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"shared": {"learning_rate": 2e-3}}, {"teacher", "alone", "distilled"}),
        ({"entries": {"a": TRAINED | {"teacher": {"max_steps": 10}}}}, {"teacher", "distilled"}),
        ({"entries": {"a": TRAINED | {"student": {"max_steps": 4}}}}, {"alone", "distilled"}),
        ({"mode_options": {"distilled": {"prediction_weight": 2.0}}}, {"distilled"}),
        ({"teacher_seeds": [1]}, {"teacher", "distilled"}),
        ({"output_dir": "elsewhere", "workers": 1, "results": "other.jsonl"}, set()),
        ({"shared": {"dataloader_num_workers": 2, "report_to": "none"}}, set()),
    ],
)
def test_other_options_make_another_run_and_another_folder(changes, changed):
    """Of a student also its teacher's; not where it lies, nor what cannot change a result."""
    base = {"entries": {"a": TRAINED}, "modes": ["alone", "distilled"]}
    before, after = (plan(comparison(**options)) for options in (base, base | changes))
    pairs = list(zip(before, after, strict=True))
    assert {old.mode for old, new in pairs if old.fingerprint != new.fingerprint} == changed
    assert {old.mode for old, new in pairs if old.folder.name != new.folder.name} >= changed


def test_a_model_counts_by_what_its_file_holds(tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text("width: 8\n")
    first = fingerprint({"model_config": str(file)})
    assert first == fingerprint({"model_config": {"width": 8}})
    file.write_text("width: 16\n")
    assert fingerprint({"model_config": str(file)}) != first


def test_the_order_of_options_does_not_count():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})


def of_equal_seconds(**changes) -> dict:
    modes = {"modes": ["alone", "longer", "distilled"], "mode_options": LONGER, "entries": {"a": TRAINED}}
    return {(run.mode, run.seed): run for run in plan(comparison(**(modes | changes)))}


def test_runs_of_equal_seconds_come_when_all_paces_are_known():
    runs = of_equal_seconds(seeds=[0, 1])
    assert list(runs)[-2:] == [("longer", 0), ("longer", 1)] and len(runs) == 7
    needed = {("alone", 0), ("alone", 1), ("distilled", 0), ("distilled", 1)}
    for seed in (0, 1):
        longer, alone = runs["longer", seed], runs["alone", seed]
        assert {(run.mode, run.seed) for run in longer.needs} == needed
        assert longer.folder.name == f"longer_seed_{seed}_{longer.fingerprint}" and longer.taught_by is None
        assert longer.options == alone.options | {"output_dir": str(longer.folder)}
    assert runs["distilled", 1].needs == (runs["teacher", 0],)


def test_what_decides_the_length_makes_another_run_and_more_seeds_do_not():
    one, more = of_equal_seconds(), of_equal_seconds(seeds=[0, 1])
    assert one["longer", 0].fingerprint == more["longer", 0].fingerprint != more["longer", 1].fingerprint
    other = of_equal_seconds(mode_options=LONGER | {"distilled": {"prediction_weight": 2.0}})
    same = of_equal_seconds(mode_options=LONGER | {"alone": {"auxiliary_queries": "learned"}})
    assert len({each["longer", 0].fingerprint for each in (one, other, same)}) == 3


def test_a_run_takes_the_seconds_of_its_own_entry():
    """Of another entry the same modes have other paces."""
    modes = {"modes": ["alone", "longer", "distilled"], "mode_options": LONGER}
    runs = plan(comparison(**modes, entries={"a": TRAINED, "b": TRAINED}))
    longer = {run.entry: run for run in runs if run.mode == "longer"}
    assert {name: {needed.entry for needed in run.needs} for name, run in longer.items()} == {"a": {"a"}, "b": {"b"}}


def test_runs_of_equal_seconds_come_seed_after_seed_too():
    """Of all entries with one seed, then with the next: what is interrupted has whole seeds."""
    modes = {"modes": ["alone", "longer", "distilled"], "mode_options": LONGER}
    runs = names(**modes, entries={"a": TRAINED, "b": TRAINED}, seeds=[0, 1])
    assert runs[-4:] == ["a longer seed 0", "b longer seed 0", "a longer seed 1", "b longer seed 1"]
