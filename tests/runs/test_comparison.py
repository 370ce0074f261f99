"""What a comparison's file may say, and what it means."""

import pytest

from d3etr_hf.runs.comparison import Comparison, Entry, EqualSeconds

TRAINED = {"teacher": {"max_steps": 9}, "student": {"max_steps": 3}}
NO_TEACHER = {"student": {"max_steps": 3}}
LONGER = {"longer": {"same_as": "alone", "equal_seconds_with": "distilled"}}


def comparison(**changes) -> Comparison:
    """One of two entries, each with a teacher that is trained."""
    return Comparison(**({"output_dir": "runs", "results": "out/results.jsonl", "entries": two()} | changes))


def two(**changes) -> dict:
    return {"first": dict(TRAINED), "second": dict(TRAINED)} | changes


def test_the_nearest_options_win():
    """Shared, then of the entry, then of its student, then of the mode."""
    entry = {"options": {"a": 1, "b": 1, "c": 1}, "student": {"b": 2, "c": 2}, "teacher": {"b": 3}}
    made = comparison(
        entries={"first": entry}, shared={"a": 0, "z": 0}, modes=["mine"], mode_options={"mine": {"c": 4, "d": 4}}
    )
    assert made.student_options(made.entry("first"), "mine") == {"z": 0, "a": 1, "b": 2, "c": 4, "d": 4}
    assert made.teacher_options("first") == {"z": 0, "a": 1, "b": 3, "c": 1}


def test_standard_modes_are_those_of_the_commands():
    """As configs/shapes/teacherless.yaml and `d3etr train` have them; the file may say what they mean instead."""
    made = comparison()
    assert made.mode("alone") == {"auxiliary_queries": "none", "adaptive_matching": False}
    assert made.mode("teacherless") == {"auxiliary_queries": "learned", "adaptive_matching": False}
    assert made.mode("distilled") == {}
    entry = made.entry("first")
    reads = {mode: made.reads_teacher(entry, mode) for mode in made.modes}
    assert reads == {"alone": False, "teacherless": False, "distilled": True}
    own = comparison(mode_options={"alone": {"auxiliary_queries": "teacher"}, "distilled": {"prediction_weight": 2}})
    assert own.mode("alone") == {"auxiliary_queries": "teacher"} and own.reads_teacher(entry, "alone")
    inheriting = comparison(
        modes=["heir"],
        mode_options={
            "heir": {"auxiliary_queries": "none", "adaptive_matching": False, "inherit_from_teacher": ["encoder"]}
        },
    )
    assert inheriting.reads_teacher(entry, "heir")


def test_a_mode_of_equal_seconds_has_the_options_of_another():
    """Which the file may have changed."""
    options = LONGER | {"alone": {"auxiliary_queries": "learned"}}
    made = comparison(modes=["alone", "distilled", "longer"], mode_options=options)
    assert made.mode("longer") == made.mode("alone") == {"auxiliary_queries": "learned"}
    assert [made.equal_seconds(mode) for mode in made.modes] == [None, None, EqualSeconds("alone", "distilled")]


def test_a_teacher_is_trained_borrowed_or_a_checkpoint():
    """Who borrows one keeps options of its own."""
    made = comparison(
        entries=two(
            first=TRAINED | {"options": {"a": 1}},
            second=NO_TEACHER | {"teacher": {"entry": "first"}, "options": {"a": 2}},
            third=NO_TEACHER | {"teacher": "user/teacher"},
        )
    )
    assert made.entry("first").teacher_entry == "first"
    assert made.entry("second") == Entry("second", {"a": 2}, {"max_steps": 3}, {"max_steps": 9}, "first")
    assert made.entry("third") == Entry("third", {}, {"max_steps": 3}, "user/teacher", "third")


@pytest.mark.parametrize(
    ("teachers", "alone"),
    [
        (("folder", "folder"), True),
        (("folder", "another"), False),
        (({"b": 1}, {"entry": "first"}), True),
        (({"b": 1}, {"b": 1}), False),  # trained for as long as its student
        (({"b": 1, "max_steps": 9}, {"b": 1, "max_steps": 9}), True),
        ((None, None), True),
    ],
)
def test_only_a_students_length_may_differ(teachers, alone):
    """Of entries whose options, of both, say how long a run is."""
    entries = {
        name: {"options": {"max_steps": steps}, "student": {"a": 1}, "teacher": teacher}
        for name, steps, teacher in zip(("first", "second"), (3, 6), teachers, strict=True)
    }
    assert comparison(entries=entries, modes=["alone"]).differs_in_length_alone == alone
    entries["second"]["options"]["max_steps"] = 3
    assert not comparison(entries=entries, modes=["alone"]).differs_in_length_alone


def test_pairs_take_the_student_of_one_and_the_teacher_of_the_other():
    """The pair of an entry with its own teacher is that entry, and is not run twice."""
    entries = two(second={"teacher": {"max_steps": 8}, "student": {"max_steps": 4}, "options": {"a": 2}})
    made = comparison(
        entries=entries,
        modes=["alone", "distilled"],
        pairs={"teachers": ["first", "second"], "students": ["first", "second"]},
    )
    assert [(entry.name, mode) for entry, mode in made.students()] == [
        ("first", "alone"),
        ("first", "distilled"),
        ("second", "alone"),
        ("second", "distilled"),
        ("second→first", "distilled"),
        ("first→second", "distilled"),
    ]
    pair = made.pair("second", "first")
    assert pair == Entry("second→first", {}, {"max_steps": 3}, {"max_steps": 8}, "second", "first")
    # where the entries themselves are not distilled, their own pairs are all the same
    alone = comparison(entries=entries, modes=["alone"], pairs={"teachers": ["first"], "students": ["first"]})
    assert [(entry.name, mode) for entry, mode in alone.students()][-1] == ("first", "distilled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": {}}, "entries is empty: name at least one"),
        ({"entries": {"a b": TRAINED}}, "entries: 'a b' is to name a folder: use letters"),
        ({"entries": {"a": TRAINED | {"studnet": {}}}}, "entries: a: unknown key 'studnet': an entry holds 'student'"),
        ({"entries": {"a": {"teacher": {}}}}, "entries: a: there is no 'student': give its options"),
        ({"entries": {"a": {"student": 3}}}, "entries: a: student must hold options by name, holds 3"),
        ({"entries": {"a": TRAINED | {"teacher": 3}}}, "entries: a: teacher must hold options by name, holds 3"),
        ({"entries": {"a": NO_TEACHER}}, "entries: 'a' has no teacher, which the mode 'distilled' needs"),
        ({"entries": two(a=NO_TEACHER | {"teacher": {"entry": "x"}})}, "entries: a: teacher: there is no entry 'x'"),
        (
            {"entries": two(a=NO_TEACHER | {"teacher": {"entry": "a"}})},
            "entries: a: teacher: the entry 'a' has no teacher of its own",
        ),
        (
            {"entries": two(a=NO_TEACHER | {"teacher": {"entry": "first", "seed": 1}})},
            "entries: a: teacher: give {entry: NAME} alone",
        ),
        ({"entries": {"a": TRAINED | {"options": {"seed": 3}}}}, "entries: a: options: leave out 'seed'"),
        ({"shared": {"output_dir": "x"}}, "shared: leave out 'output_dir': every run of a comparison gets its own"),
        ({"mode_options": {"alone": {"teacher": "x"}}}, "mode_options: alone: leave out 'teacher'"),
        ({"modes": ["alone", "distiled"]}, "modes: nobody defines 'distiled': give its options in mode_options, or"),
        ({"modes": ["alone", "alone"]}, "modes: 'alone' is given twice"),
        ({"modes": []}, "modes is empty"),
        ({"modes": ["teacher"]}, "modes: 'teacher' is what the runs of teachers are called"),
        ({"mode_options": {"distiled": {}}}, "mode_options: 'distiled' is none of the modes"),
        (
            {"modes": ["alone", "longer"], "mode_options": LONGER},
            r"mode_options: longer: equal_seconds_with is 'distilled': choose one of the modes \['alone'\], or add",
        ),
        (
            {"modes": ["alone", "longer"], "mode_options": {"longer": dict.fromkeys(LONGER["longer"], "alone")}},
            "mode_options: longer: same_as and equal_seconds_with are both 'alone': name two modes",
        ),
        (
            {
                "modes": ["alone", "teacherless", "distilled"],
                "mode_options": {"distilled": {"same_as": "teacherless", "equal_seconds_with": "alone"}},
                "pairs": {"teachers": ["a"], "students": ["b"]},
            },
            "pairs are distilled, .*: give another mode than distilled equal_seconds_with",
        ),
        (
            {"modes": ["distilled", "longer"], "mode_options": LONGER},
            "mode_options: longer: same_as is 'alone': choose",
        ),
        (
            {
                "modes": ["alone", "distilled", "longer", "again"],
                "mode_options": LONGER | {"again": LONGER["longer"] | {"same_as": "longer"}},
            },
            "mode_options: again: same_as is 'longer': choose",
        ),
        (
            {
                "modes": ["alone", "longer"],
                "mode_options": {"longer": {"equal_seconds_with": "alone", "max_steps": 1}},
            },
            "mode_options: longer: give {same_as: MODE, equal_seconds_with: MODE} and nothing besides",
        ),
        ({"baseline": "none"}, "baseline is 'none': choose one of the modes"),
        (
            {"modes": ["alone", "distilled", "longer"], "mode_options": LONGER, "baseline": "longer"},
            "baseline is 'longer', whose runs have other steps",
        ),
        ({"seeds": []}, r"seeds is \[\]: give at least one"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"seeds": [-1]}, r"seeds is \[-1\]: .*at least 0"),
        ({"seeds": [0, 1, 2], "teacher_seeds": [0, 1]}, r"teacher_seeds is \[0, 1\]: give one for all, or the seeds"),
        ({"results": "x.md"}, "results is 'x.md': must end with .jsonl"),
        ({"workers": 0}, "workers is 0: it must be at least 1"),
        ({"pairs": {"teachers": ["first"]}}, "pairs must hold 'teachers' and 'students', holds"),
        ({"pairs": {"teachers": ["x"], "students": []}}, "pairs: teachers: there is no entry 'x'"),
        ({"pairs": {"teachers": ["first"] * 2, "students": []}}, "pairs: teachers: 'first' is given twice"),
        (
            {"entries": two(a=NO_TEACHER), "modes": ["alone"], "pairs": {"teachers": ["a"], "students": ["first"]}},
            "pairs: teachers: the entry 'a' has no teacher of its own",
        ),
        (
            {"modes": ["distilled"], "pairs": {"teachers": ["first"], "students": ["second"]}},
            "pairs are compared with the student alone: add 'alone' to modes, or name a baseline",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        comparison(**changes)
