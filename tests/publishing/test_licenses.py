"""Whose licence a card tells, and who is asked for one."""

import io
import json
import shutil
import sys

import pytest
from huggingface_hub import ModelCard

from d3etr_hf.cli.publish import with_license
from d3etr_hf.configurations import read_yaml, write_yaml
from d3etr_hf.errors import CommandLineError
from d3etr_hf.publishing.card import CardArguments, write_card
from d3etr_hf.publishing.licenses import license_in, licenses_of
from d3etr_hf.publishing.measurements import METRICS
from d3etr_hf.publishing.publish import PublishArguments, write_model_card


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ndate: 2024-01-01\n---\n# Teacher\n", "apache-2.0"),
        ("\ufeff---\r\ntags: [x]\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ("---\nlicense: [mit, other]\n---", "mit, other"),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        ("# A title\n\nlicense: mit\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("", None),
    ],
)
def test_licence_of_a_card(tmp_path, card, license):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_in(tmp_path) == license
    assert licenses_of(teacher=str(tmp_path), started_from=None) == ({"teacher": license} if license else {})


def test_card_that_is_damaged_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("d3etr_hf.publishing.licenses.logger.warning", told.append)
    for damaged in (b"---\nlicense: [\n---\n", b"---\nlicense: \xff\n---\n"):
        (tmp_path / "README.md").write_bytes(damaged)
        assert license_in(tmp_path) is None
    assert len(told) == 2 and all(f"{tmp_path / 'README.md'}: its licence cannot be read" in line for line in told)


def test_no_folder_is_not_the_working_directory(tmp_path, monkeypatch):
    """A new model has no name, and the directory that a run is started in has a README of its own."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    assert licenses_of(started_from="", teacher="owner/name") == {}


def test_licence_of_the_teacher_reaches_the_card(finished_runs, distilled, tmp_path):
    """Measured with the rest, so that it is told when the teacher is gone; with its address where that is given."""
    teacher = shutil.copytree(finished_runs / "teacher", tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    configuration = read_yaml((distilled / "run.yaml").read_text())
    (distilled / "run.yaml").write_text(write_yaml(configuration | {"teacher": str(teacher)}))
    write_model_card(distilled, CardArguments(license="mit"))
    shutil.rmtree(teacher)
    card = ModelCard.load(write_model_card(distilled, CardArguments(teacher_id="owner/teacher")))
    assert card.data.license == "mit"
    link = "[owner/teacher](https://huggingface.co/owner/teacher)"
    told = f"## Licence\n\n- This model: mit.\n- Its teacher, {link}: cc-by-nc-4.0, as its card says.\n\n## Versions"
    assert told in card.text
    metrics = json.loads((distilled / METRICS).read_text())
    del metrics["licenses"]
    (distilled / "README.md").unlink()
    card = ModelCard.load(write_card(distilled, metrics, CardArguments(teacher_id="owner/teacher")))
    assert f"- Its teacher, {link}: as its page says." in card.text and "This model:" not in card.text
    assert "## Licence" not in ModelCard.load(write_card(distilled, metrics, CardArguments())).text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Somebody at a terminal who answers what is put in."""

    def answer(text: str) -> Terminal:
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return answer


def test_a_person_is_asked(distilled, terminal):
    """Once, before an upload alone, unless it is given or told already."""
    upload = PublishArguments(str(distilled), "user/student")
    shown = terminal("apache-2.0\n")
    assert with_license(upload, CardArguments()).license == "apache-2.0"
    assert f"{distilled} has no licence" in shown.getvalue() and "or type it here: " in shown.getvalue()
    for asked, card in (
        (upload, CardArguments(license="mit")),
        (PublishArguments(str(distilled)), CardArguments()),
        (PublishArguments(str(distilled), "user/student", dry_run=True), CardArguments()),
    ):
        shown = terminal("apache-2.0\n")
        assert with_license(asked, card) == card and not shown.getvalue()
    terminal("\n")
    assert with_license(upload, CardArguments()).license is None
    terminal("Apache 2.0\n")
    with pytest.raises(CommandLineError, match="'Apache 2.0' is no identifier of the Hub's"):
        with_license(upload, CardArguments())


def test_nobody_is_asked_without_a_terminal(distilled, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("mit\n"))
    assert with_license(PublishArguments(str(distilled), "user/student"), CardArguments()).license is None
