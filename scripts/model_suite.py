"""Transformers' own tests of its detectors, run on the stock classes and on the project's in their place.

    python scripts/model_suite.py TRANSFORMERS [--families detr rt_detr]

TRANSFORMERS is a checkout of Transformers, or a folder with its `tests/` and `src/`, of the installed version or the
nearest that is at hand (`pip download --no-binary transformers transformers==VERSION` has what all models share).
Needs pytest, parameterized and what the tests import; tests that read the Hub fail or are skipped on both sides.
Minutes a family; exit code 1 where a test fails for the project's class and not for the stock one.
"""

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3etr_hf.models.families import FAMILIES

STOCK, OURS = "stock", "ours"
FAILED, SKIPPED, PASSED = "failed", "skipped", "passed"


class Outcomes:
    """A plugin of pytest that keeps how each test went, by class and name."""

    def __init__(self):
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::", 1)[1]
        if report.failed or (report.skipped and self.found.get(name) != FAILED):
            self.found[name] = report.outcome
        elif report.when == "call":
            self.found.setdefault(name, report.outcome)


def outcomes(folder: Path, family: str, which: str, select: str) -> dict[str, str]:
    """How the tests of a family went, in a process of their own.

    Args:
        folder: it has Transformers' `tests/`.
        family: one of `FAMILIES`.
        which: with `OURS` the tests find the project's class wherever they ask for the stock one.
        select: as pytest's `-k`.
    """
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_SAFETENSORS_CONVERSION": "true"}
    sys.path.insert(0, str(folder))
    if which == OURS:
        ours = FAMILIES[family]
        stock = ours.stock_class
        ours.__name__ = stock.__name__  # the tests ask for it
        setattr(transformers, stock.__name__, ours)
    module = family.replace("-", "_")
    record = Outcomes()
    code = pytest.main(
        [f"tests/models/{module}/test_modeling_{module}.py", "-k", select, "-q", "--noconftest", "--tb=short"]
        + ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(folder)],
        plugins=[record],
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ran no tests of {family}; what it printed says why")
    return record.found


def line(family: str, results: dict[str, dict[str, str]]) -> str:
    """A row of the table: of each class passed, failed and skipped."""
    counts = {which: Counter(found.values()) for which, found in results.items()}
    cells = [" / ".join(str(counts[which][each]) for each in (PASSED, FAILED, SKIPPED)) for which in (STOCK, OURS)]
    return f"| {FAMILIES[family].title} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transformers", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--select", default="ModelTest", help="which tests, as pytest's -k (default: %(default)s)")
    args = parser.parse_args()
    folder, rows, worse = args.transformers.resolve(), [], {}
    if not (folder / "tests" / "models").is_dir():
        parser.error(f"{args.transformers} has no tests/models: give a checkout of Transformers")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        for family in args.families:
            results = {
                which: processes.submit(outcomes, folder, family, which, args.select).result()
                for which in (STOCK, OURS)
            }
            rows.append(line(family, results))
            failed = [name for name, outcome in results[OURS].items() if outcome == FAILED]
            worse[family] = [name for name in failed if results[STOCK].get(name) != FAILED]
            print(rows[-1], *worse[family], sep="\n", flush=True)
    print(f"\nTransformers {transformers.__version__}: passed / failed / skipped")
    print("| family | stock | ours |\n|---|---|---|", *rows, sep="\n")
    for family, names in worse.items():
        print(*(f"{family}: {name} fails for ours alone" for name in names), sep="\n", end="\n" if names else "")
    sys.exit(any(worse.values()))


if __name__ == "__main__":
    main()
