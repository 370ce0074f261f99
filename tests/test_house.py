"""Functions stay small enough to be read at once."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "d3etr_hf"
CHECKED = ""  # the whole package
MOST_LINES, MOST_PARAMETERS = 50, 7
# "file::Class.function": why it may be larger, for example a library's signature that it overrides
ALLOWED = {
    "models/group_attention.py::query_group_attention": "the signature of Transformers' attention interface",
}


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a file, by "file::Class.name"; one within another by both names."""
    return functions_within(ast.parse(path.read_text(encoding="utf-8")), f"{path.relative_to(PACKAGE).as_posix()}::")


def functions_within(node: ast.AST, prefix: str) -> dict[str, ast.FunctionDef]:
    """All of them, classes and functions in between named; one that is defined again gets its line, too."""
    found: dict[str, ast.FunctionDef] = {}
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found |= functions_within(child, prefix)
            continue
        name = f"{prefix}{child.name}"
        if not isinstance(child, ast.ClassDef):
            found[f"{name}:{child.lineno}" if name in found else name] = child
        found |= functions_within(child, f"{name}.")
    return found


def parameters_of(function: ast.FunctionDef) -> int:
    """How many parameters a function has, `self` and `cls` aside."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len([each for each in (*named, *starred) if each.arg not in ("self", "cls")])


FUNCTIONS = {
    name: function
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).as_posix().startswith(CHECKED)
    for name, function in functions_of(path).items()
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - ALLOWED.keys()))
def test_function_is_small(name):
    """Its docstring counts."""
    function = FUNCTIONS[name]
    assert function.end_lineno - function.lineno + 1 <= MOST_LINES
    assert parameters_of(function) <= MOST_PARAMETERS


def test_no_function_hides_another():
    """Methods of one name in two classes, and functions within functions, are all seen."""
    nodes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(FUNCTIONS) == len(nodes)
    assert "models/detr.py::PlainDetector.criterion" in FUNCTIONS


def test_nothing_is_allowed_that_is_gone():
    assert ALLOWED.keys() <= FUNCTIONS.keys()


# what belongs to one family: its classes, its parts, its configuration's fields, its name in Transformers
FAMILY_WORDS = re.compile(
    r"Conditional|conditional_detr|Detr[A-Z]\w*|\bd_model|query_position_embeddings|ref_point_head|input_projection|"
    r"class_labels_classifier|bbox_\w+|backbone_config|freeze_backbone|encoder_attn|(?:de|en)coder_(?:layers|ffn_dim|"
    r"attention_heads|layerdrop)|num_queries|(?:cls|giou)_loss_coefficient|eos_coefficient|focal_alpha"
)
ELSEWHERE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "models"]


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_models_know_a_family(path):
    """Prose may tell where a formula comes from; names and strings of code may not depend on a family."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        if isinstance(node, ast.Constant) and id(node) not in prose and " " not in str(node.value):
            words.append(node.value)  # an option's help and an error's message are prose
        found += [word for word in words if isinstance(word, str) and FAMILY_WORDS.search(word)]
    # the package's face hands on the class that its users import
    expected = {"D3etrConditionalDetrForObjectDetection"} if path == PACKAGE / "__init__.py" else set()
    assert set(found) <= expected
