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


class Suite:
    """A plugin of pytest: the class that the tests take, and how each test went, by class and name.

    Args:
        name: of the stock class.
        ours: the class in its place; None leaves the stock one there.
    """

    def __init__(self, name: str, ours: type | None):
        self.name, self.ours = name, ours
        self.found: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items):
        if self.ours is None:
            return
        self.ours.__name__ = self.name  # the tests ask for it
        cases = {item.cls for item in items if hasattr(item.cls, "all_model_classes")}
        of_ours = [case for case in cases if self.name in {each.__name__ for each in case.all_model_classes}]
        if not of_ours:
            raise pytest.UsageError(f"no test takes {self.name}")
        for case in of_ours:
            case.all_model_classes = tuple(map(self.in_place, case.all_model_classes))
            tasks = case.pipeline_model_mapping
            case.pipeline_model_mapping = {task: self.in_place(each) for task, each in tasks.items()}
            setattr(sys.modules[case.__module__], self.name, self.ours)

    def in_place(self, tested: type) -> type:
        return self.ours if tested.__name__ == self.name else tested

    def pytest_runtest_logreport(self, report):
        """A test's own report comes after those of its subtests."""
        name = report.nodeid.split("::", 1)[1]
        if report.failed or (self.found.get(name) != FAILED and (report.skipped or report.when == "call")):
            self.found[name] = report.outcome


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
    module = family.replace("-", "_")
    suite = Suite(FAMILIES[family].stock_class.__name__, FAMILIES[family] if which == OURS else None)
    code = pytest.main(
        [f"tests/models/{module}/test_modeling_{module}.py", "-k", select, "-q", "--noconftest", "--tb=short"]
        + ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(folder)],
        plugins=[suite],
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ran no tests of {family}; what it printed says why")
    return suite.found


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
