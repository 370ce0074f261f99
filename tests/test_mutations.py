"""The table of tests/mutations.py is up to date; what its rows show takes `python tests/mutations.py`."""

import ast
from collections import Counter
from functools import cache

import pytest

from tests.mutations import MUTATIONS, REPOSITORY, left_out


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("file", "old", "new", "test"), [row[1:] for row in MUTATIONS], ids=[row[0] for row in MUTATIONS]
)
def test_a_row_can_be_tried(file, old, new, test):
    """Its text stands in its file once, what is put there is code, and its test exists."""
    source = (REPOSITORY / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, (
        f"{file} holds {old!r} {source.count(old)} times: bring tests/mutations.py up to date"
    )
    assert old != new
    ast.parse(source.replace(old, new))
    place, _, name = test.partition("::")
    assert (REPOSITORY / place).is_file(), f"{place} is gone"
    assert not name or name.partition("[")[0] in names_in(place), f"{place} no longer has {name}"


def test_rows_are_told_apart():
    assert max(Counter(row[0] for row in MUTATIONS).values()) == 1


def test_the_whole_package_is_copied():
    """A room that is left out may be found elsewhere, unmutated."""
    for folder in ("d3etr_hf", "d3etr_hf/data", "tests", "configs"):
        names = [path.name for path in (REPOSITORY / folder).iterdir()]
        assert left_out(str(REPOSITORY / folder), names) <= {"__pycache__"}
    assert left_out(str(REPOSITORY), [".git", "runs", "tests"]) == {".git", "runs"}
