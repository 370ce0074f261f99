"""What every test shares: no network, one thread, no window, caches of its own, and the real images."""

import logging
import os
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = tempfile.TemporaryDirectory(prefix="d3etr_hf_tests_")

# At import, since the libraries read these when they are imported themselves.
os.environ.update(
    HF_DATASETS_CACHE=CACHE.name,
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    CACHE.cleanup()


@pytest.fixture(autouse=True)
def own_logging():
    """What a command sets up for its own process ends with the test that calls it."""
    logger = logging.getLogger("d3etr_hf")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def fresh_processes():
    """Processes that have imported nothing of this package; see tests/fresh_process.py."""
    from tests.fresh_process import FreshProcesses

    with FreshProcesses() as processes:
        yield processes


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the repository, described in its own README."""
    folder = REPOSITORY / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images are absent: no folder ../shared/data beside the repository")
    return folder.resolve()
