"""What an index, a citation tool and a type checker read of the package."""

import re
from pathlib import Path

from ruamel.yaml import YAML

import d3etr_hf
from d3etr_hf.publishing.citations import D3ETR

REPOSITORY = Path(__file__).resolve().parents[1]


def test_citation_file_is_the_paper_and_this_version():
    """The fields that CFF 1.2 wants, and the paper's, which the cards cite in BibTeX."""
    citation = YAML(typ="safe").load(REPOSITORY / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == d3etr_hf.__version__
    paper = citation["preferred-citation"]
    assert paper["doi"] in D3ETR and f"{paper['start']}--{paper['end']}" in D3ETR and str(paper["year"]) in D3ETR
    names = [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
    assert " and ".join(names) in D3ETR


def test_every_python_of_the_table_is_claimed():
    """And no other: `scripts/version_table.py` tries them."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    claimed = re.findall(r"Python :: (3\.\d+)", project)
    tried = re.findall(r'"(3\.\d+)", "torch', (REPOSITORY / "scripts" / "version_table.py").read_text())
    assert sorted(claimed) == sorted(tried)
    assert f'requires-python = ">={claimed[0]}"' in project
    for package in ("torch", "transformers"):
        (lowest,) = re.findall(rf'^    "{package}>=([\d.]+)', project, re.M)
        assert f'"{package}=={lowest}' in (REPOSITORY / "scripts" / "version_table.py").read_text()


def test_the_package_is_typed_and_says_so():
    assert (Path(d3etr_hf.__file__).parent / "py.typed").exists()
