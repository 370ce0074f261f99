"""A teacher, a distilled student and a student alone, each a finished run of the scripts' own function."""

import shutil

import pytest
from huggingface_hub import constants

from d3etr_hf.cli.training_run import train_detector
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.publishing import inference_cost
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.publish import prepare
from d3etr_hf.publishing.run_folder import load_run
from tests.cli.test_training_run import SIDE, arguments
from tests.hub_server import HubServer
from tests.tiny import tiny_model

TOKEN = "hf_" + "loopbackToken" * 3


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """The folder that holds `data`, `teacher`, `distilled` and `alone`."""
    root = tmp_path_factory.mktemp("finished_runs")
    make_shapes(root / "data", 16, 8, image_size=SIDE, progress=False)
    tiny_model(seed=1).save_pretrained(root / "teacher")
    load_image_processor(None, SIDE, SIDE).save_pretrained(root / "teacher")
    train_detector(*arguments(root / "data", root / "distilled", teacher=root / "teacher"))
    train_detector(*arguments(root / "data", root / "alone"))
    return root


@pytest.fixture(scope="session")
def prepared(finished_runs, tmp_path_factory):
    """The distilled run with its card, compared with the student alone."""
    folder = shutil.copytree(finished_runs / "distilled", tmp_path_factory.mktemp("prepared") / "student")
    card = CardArguments(license="mit", compare=[f"student alone={finished_runs / 'alone'}"])
    prepare(load_run(folder), card)
    return folder


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Milliseconds of tiny models need no fifty rounds."""
    monkeypatch.setattr(inference_cost, "MOST_ROUNDS", 5)


@pytest.fixture
def distilled(finished_runs, tmp_path):
    """A copy of the distilled student's folder that a test may change."""
    return shutil.copytree(finished_runs / "distilled", tmp_path / "distilled")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback Hub that this process talks to, with the token `TOKEN`, and without pauses between tries."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # certificates take most of a test's time, and none is needed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        # one for the whole process, which may have been made with the Hub's own address
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield server
