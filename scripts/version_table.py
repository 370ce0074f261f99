"""Python x torch x Transformers: the tests in fresh environments, and the table of what passed.

    python scripts/version_table.py                 # the corners run all tests, the Pythons between a selection
    python scripts/version_table.py --selection     # the selection everywhere: at most three minutes each
    python scripts/version_table.py --only oldest newest
    python scripts/version_table.py --pythons /opt/python3.10/bin /opt/python3.13/bin

The environments are made in a temporary folder, with what pip finds on the configured index, and removed afterwards;
`--folder` keeps them, and takes those that are there. Exit code 1 where something fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
# what the tests need besides the package, and what those of exports need, which is a newer torch than the oldest
TEST_TOOLS = ("hypothesis>=6.100", "pytest>=8.2")
ONNX_TOOLS = ("onnx>=1.17", "onnxruntime>=1.19", "onnxscript>=0.7")
# quick files of every room, without those that train for long or start other processes
SELECTION = (
    "tests/losses",
    "tests/matching",
    "tests/outputs",
    "tests/data/test_coco.py",
    "tests/data/test_transforms.py",
    "tests/models/test_conditional_detr.py",
    "tests/models/test_rf_detr.py",
    "tests/models/test_loading.py",
    "tests/publishing/test_card.py",
    "tests/runs",
    "tests/test_configs.py",
    "tests/test_configurations.py",
    "tests/test_files.py",
    "tests/test_imports.py",
)


class Case(NamedTuple):
    """One row: a Python, what pip is asked for, and whether all tests run."""

    name: str
    python: str
    torch: str
    transformers: str
    all_tests: bool


CASES = (
    Case("oldest", "3.10", "torch==2.6.0", "transformers==5.20.0", True),
    Case("between", "3.11", "torch==2.13.0", "transformers", False),
    Case("between", "3.12", "torch", "transformers", False),
    Case("newest", "3.13", "torch", "transformers", True),
)


def python_of(version: str, folders: list[Path]) -> str | None:
    """The interpreter of this version in one of these folders or on the path."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which(f"python{version}", path=path)


def environment_of(case: Case, python: str, folder: Path) -> Path:
    """The interpreter of the case's environment, which is made unless it is there."""
    place = folder / f"python{case.python}-{case.name}"
    ours = place / "bin" / "python"
    if (place / "ready").exists():
        return ours
    subprocess.run([python, "-m", "venv", "--clear", str(place)], check=True)
    onnx = () if case.torch == CASES[0].torch else ONNX_TOOLS
    # not compiled: most of what is installed is never imported
    install = [str(ours), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*install, case.torch, case.transformers, *TEST_TOOLS, *onnx, str(REPOSITORY)], check=True)
    (place / "ready").touch()
    return ours


def version_of(python: Path, package: str) -> str:
    program = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def row_of(case: Case, python: Path, all_tests: bool) -> tuple[str, bool]:
    """The case's line of the table, and whether everything passed."""
    chosen = () if all_tests else SELECTION
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    seconds = round(time.monotonic() - started)
    print(result.stdout, flush=True)
    counts = dict(
        (word, number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", result.stdout)
    )
    cells = [version_of(python, "torch"), version_of(python, "transformers"), "all" if all_tests else "selection"]
    cells += [counts.get(word, "0") for word in ("passed", "failed", "error", "skipped")]
    return f"| {case.python} | {' | '.join(cells)} | {seconds} |", result.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", type=Path, nargs="+", default=[], help="folders with python3.10 and so on")
    parser.add_argument("--only", nargs="+", choices=sorted({case.name for case in CASES} | {c.python for c in CASES}))
    parser.add_argument("--selection", action="store_true", help="no case runs all tests")
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.only or {case.name, case.python} & set(args.only)]
    pythons = {case: python_of(case.python, args.pythons) for case in cases}
    if missing := [case.python for case, python in pythons.items() if python is None]:
        parser.error(f"there is no python{missing[0]}: give its folder in --pythons, or leave it out by --only")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases:
            python = environment_of(case, pythons[case], args.folder or Path(temporary))
            rows.append(row_of(case, python, case.all_tests and not args.selection))
    print("| Python | torch | Transformers | tests | passed | failed | errors | skipped | seconds |")
    print("|---|---|---|---|---|---|---|---|---|", *(row for row, _ in rows), sep="\n")
    sys.exit(not all(passed for _, passed in rows))


if __name__ == "__main__":
    main()
