"""A comparison's tables hold the right numbers."""

from d3etr_hf.visualization.comparison_tables import format_comparison
from tests.runs.test_comparison import LONGER, NO_TEACHER, TRAINED, comparison

ENTRIES = {"a": TRAINED, "b": TRAINED}


def line(family, mode, seed, ap, seconds=60.0, steps=None) -> dict:
    parameters = 423849 if mode == "teacher" else 362977
    scores = {"AP": ap, "AP50": ap + 0.2, "seconds": seconds, "parameters": parameters}
    scores |= {} if steps is None else {"steps": steps}
    return {"family": family, "mode": mode, "seed": seed} | scores


LINES = [
    line("a", "teacher", 0, 0.7, 300.4),
    line("a", "alone", 0, 0.1),
    line("a", "alone", 1, 0.2),
    line("a", "distilled", 0, 0.4),
    line("a", "distilled", 1, 0.6),
    line("b", "alone", 1, 0.15),
    line("b→a", "distilled", 0, 0.35),
    line("b→a", "distilled", 1, 0.55),
]


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]


def block_of(text: str, title: str) -> list[list[str]]:
    """The rows of the table that follows a title, without the line under its header."""
    blocks = text.split("\n\n")
    (place,) = [index for index, block in enumerate(blocks) if block.startswith(title)]
    header, _, *rows = rows_of(blocks[place + 1])
    return [header, *rows]


def test_table_by_hand():
    """Deviation of 0.1 and 0.2: 0.1 / √2; t with one degree of freedom: 12.706."""
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1])
    text = format_comparison(made, LINES)
    assert block_of(text, "AP (0..100), mean ± standard deviation over seeds 0, 1:") == [
        ["family", "parameters", "teacher", "alone", "distilled"],
        ["a", "362,977", "70.0", "15.0 ± 7.1", "50.0 ± 14.1"],
        ["b", "362,977", "—", "15.0 (1 of 2 seeds)", "—"],
    ]
    assert block_of(text, "AP50")[1] == ["a", "362,977", "90.0", "35.0 ± 7.1", "70.0 ± 14.1"]
    assert block_of(text, "Seconds")[1] == ["a", "362,977", "300", "60 ± 0", "60 ± 0"]
    # differences 30 and 40: mean 35, 12.706 · 5 to either side
    assert block_of(text, "AP minus AP alone, of the same seed:") == [
        ["family", "mode", "difference", "each seed's (seed)", "95 % t-interval of the mean"],
        ["a", "distilled", "+35.0", "+30.0 (0), +40.0 (1)", "-28.5 to +98.5"],
    ]
    assert "by teacher and student" not in text


def test_many_modes_have_a_row_each():
    """Steps of 24, 30 and 15 seconds: the median of runs, each of another length; what has no run has no row."""
    modes = {f"mode_{index}": {} for index in range(7)}
    made = comparison(entries=ENTRIES, modes=["alone", *modes], mode_options=modes, seeds=[0, 1, 2])
    lines = [line("a", "alone", seed, 0.1 + 0.1 * seed, 60.0 * (3 - seed), 6 - seed) for seed in (0, 1, 2)]
    lines += [line("b", "mode_6", 2, 0.5, 5.0, 10), line("a", "teacher", 0, 0.7)]
    text = format_comparison(made, lines)
    assert block_of(text, "AP and AP50 (0..100) and steps, mean ± standard deviation over seeds 0, 1, 2") == [
        ["family", "mode", "parameters", "seeds", "AP", "AP50", "steps", "ms a step"],
        ["a", "teacher", "423,849", "1", "70.0", "90.0", "—", "—"],
        ["a", "alone", "362,977", "3", "20.0 ± 10.0", "40.0 ± 10.0", "5 ± 1", "24000"],
        ["b", "mode_6", "362,977", "1 of 3", "50.0", "70.0", "10", "500"],
    ]
    assert "Seconds" not in text and "AP50 (0..100)," not in text


def test_differences_are_of_runs_of_one_seed():
    """Of the unpaired runs the mean would be another."""
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1])
    lines = [each for each in LINES if (each["mode"], each["seed"]) != ("alone", 0)]
    (row,) = block_of(format_comparison(made, lines), "AP minus")[1:]
    assert row == ["a", "distilled", "+40.0", "+40.0 (1)", "—"]


def test_equal_seconds_have_a_table_of_their_own():
    """Not among the differences at equal steps; 15 AP less than distilled with seed 0, 5 with seed 1."""
    made = comparison(entries=ENTRIES, modes=["alone", "distilled", "longer"], mode_options=LONGER, seeds=[0, 1])
    longer = [line("a", "longer", seed, ap, 100.0, 5) for seed, ap in ((0, 0.25), (1, 0.55))]
    of_steps = [line(*(each[name] for name in ("family", "mode", "seed", "AP", "seconds")), 3) for each in LINES]
    text = format_comparison(made, [*of_steps, *longer])
    (row,) = block_of(text, "At equal seconds")[1:]
    assert row[:4] == ["a", "distilled minus longer", "+10.0", "+15.0 (0), +5.0 (1)"]
    assert [row[1] for row in block_of(text, "AP minus AP alone, of the same seed, at equal steps:")] == [
        "mode",
        "distilled",
    ]
    assert block_of(text, "Steps")[1][3:] == ["3 ± 0", "3 ± 0", "5 ± 0"]
    other = [*of_steps, *longer, line("a", "distilled", 2, 0.3, 60.0, 4)]
    assert "at equal steps" not in format_comparison(made, other)


def test_another_baseline_or_none():
    modes = {"modes": ["alone", "distilled"], "seeds": [0, 1]}
    text = format_comparison(comparison(entries=ENTRIES, baseline="distilled", **modes), LINES)
    assert block_of(text, "AP minus AP distilled")[1][:3] == ["a", "alone", "-35.0"]
    assert "AP minus" not in format_comparison(comparison(entries=ENTRIES, modes=["distilled"]), LINES)


def test_pairs_by_teacher_and_student():
    """Rows are teachers; the diagonal is the entry itself."""
    pairs = {"teachers": ["a", "b"], "students": ["a", "b"]}
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1], pairs=pairs)
    table = block_of(format_comparison(made, LINES), "AP distilled minus AP alone")
    assert table == [
        ["teacher \\ student", "a", "b"],
        ["a", "+35.0 ± 7.1 (AP 50.0)", "—"],
        ["b", "+30.0 ± 7.1 (AP 45.0)", "—"],
    ]


def test_a_pair_has_gain_and_average_precision_of_the_same_seeds():
    """Distilled has 40 and 60; alone only the first, 10."""
    pairs = {"teachers": ["a"], "students": ["a", "b"]}
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1], pairs=pairs)
    lines = [each for each in LINES if (each["mode"], each["seed"]) != ("alone", 1)]
    table = block_of(format_comparison(made, lines), "AP distilled minus AP alone")
    assert table[1] == ["a", "+30.0 (AP 40.0, 1 of 2 seeds)", "—"]


def test_what_keeps_runs_from_being_compared_comes_first():
    made = comparison(entries=ENTRIES, modes=["alone", "distilled"], seeds=[0, 1])
    assert format_comparison(made, LINES).startswith("AP (0..100)")
    places = [{"device": device, "threads": 1} for device in ("CPU", "CPU", "H100")]
    read = [{"inputs": {"teacher": mark}} for mark in "aab"]
    lines = [line | place for line, place in zip(LINES[2:5], places, strict=True)]
    assert format_comparison(made, lines).startswith(
        "Seconds are of different machines, and not comparable throughout: 2 on CPU, threads: 1; 1 on H100, threads: 1"
    )
    lines = [line | {"seed": 0} | inputs for line, inputs in zip(LINES[2:5], read, strict=True)]
    assert format_comparison(made, lines).startswith(
        "**Not comparable**: the runs of some rows have read different data or models (a: the teacher). Remove"
    )


def test_a_borrowed_teacher_is_shown_where_it_teaches():
    entries = {"a": TRAINED, "c": NO_TEACHER | {"teacher": {"entry": "a"}}}
    text = format_comparison(comparison(entries=entries, modes=["alone", "distilled"]), LINES)
    assert block_of(text, "AP (0..100), seed 0:")[2] == ["c", "—", "70.0", "—", "—"]


def test_entries_of_different_length_are_at_equal_steps():
    """A difference is of runs of one entry."""
    lines = [
        line(entry, mode, 0, 0.1, steps=steps)
        for entry, steps in (("a", 3), ("b", 6))
        for mode in ("alone", "distilled")
    ]
    text = format_comparison(comparison(entries=ENTRIES, modes=["alone", "distilled"]), lines)
    assert len(block_of(text, "AP minus AP alone, of the same seed, at equal steps:")) == 3
