"""Configuration files: where they are looked for, and what their YAML means."""

import pytest

from d3etr_hf import configurations
from d3etr_hf.configurations import find_configuration, read_yaml, shipped_configurations, write_yaml
from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import ModelArguments, read_model_options


def test_working_directory_comes_before_what_is_shipped(tmp_path, monkeypatch):
    """Anywhere else than in the repository a recipe still finds the model that it names."""
    monkeypatch.chdir(tmp_path)
    name = "configs/shapes/student_model.yaml"
    assert find_configuration(name) == shipped_configurations() / "shapes" / "student_model.yaml"
    shipped = read_model_options(ModelArguments(model_config=name))
    assert shipped["d_model"] > 0
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("d_model: 8")
    assert read_model_options(ModelArguments(model_config=name)) == {"d_model": 8}


def test_a_file_that_is_nowhere_is_named_in_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetectorLoadError) as caught:
        read_model_options(ModelArguments(model_config="configs/none.yaml"))
    assert f"neither {tmp_path / 'configs/none.yaml'} nor {shipped_configurations() / 'none.yaml'}" in str(
        caught.value
    )


def test_an_installed_package_ships_its_own(tmp_path, monkeypatch):
    """A wheel has them beside its modules, a checkout beside the package."""
    monkeypatch.setattr(configurations, "PACKAGE", tmp_path)
    (tmp_path / "configs").mkdir()
    assert shipped_configurations() == tmp_path / "configs"


def test_yaml_is_read_back_as_it_was_written():
    """Guards text that looks like something else, small numbers, and the order of the keys."""
    values = {"z": "1e5", "a": 1e-5, "b": "no", "c": "true", "d": None, "e": [1, "2"], "f": {"g": {"h": 0.1}}, "i": ""}
    assert read_yaml(write_yaml(values)) == values
    assert list(read_yaml(write_yaml(values))) == list(values)
    assert write_yaml({}) == "" and read_yaml("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: {c: 1, c: 2}",
            r"duplicate key \"c\" with value \"2\" \(original value: \"1\"\) \(line 2, column 11\)",
        ),
        ("a: b: c", r"mapping values are not allowed here \(line 1, column 5\)"),
        ("a: [", r"line 1"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_place(text, message):
    with pytest.raises(ValueError, match=f"not valid YAML: .*{message}"):
        read_yaml(text)
