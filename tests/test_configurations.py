"""Configuration files: where they are looked for, and what their YAML means."""

import os
import time
from dataclasses import dataclass

import pytest

from d3etr_hf import configurations
from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import (
    find_configuration,
    read_yaml,
    read_yaml_file,
    shipped,
    write_yaml,
)
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import ConfigurationError, DetectorLoadError, UserError
from d3etr_hf.models.loading import ModelArguments, read_model_options


@dataclass
class WithShare:
    share: float = 0.5


def test_working_directory_comes_before_what_is_shipped(tmp_path, monkeypatch):
    """Anywhere else than in the repository a recipe still finds the model that it names."""
    monkeypatch.chdir(tmp_path)
    name = "configs/shapes/student_model.yaml"
    assert find_configuration(name) == shipped("configs") / "shapes" / "student_model.yaml"
    assert read_model_options(ModelArguments(model_config=name))["d_model"] > 0
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("d_model: 8")
    assert read_model_options(ModelArguments(model_config=name)) == {"d_model": 8}


def test_a_file_that_is_nowhere_is_named_in_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetectorLoadError) as caught:
        read_model_options(ModelArguments(model_config="configs/none.yaml"))
    assert f"neither {tmp_path / 'configs/none.yaml'} nor {shipped('configs') / 'none.yaml'}" in str(caught.value)


def test_an_installed_package_ships_its_own(tmp_path, monkeypatch):
    """A wheel has them beside its modules, a checkout beside the package."""
    monkeypatch.setattr(configurations, "PACKAGE", tmp_path)
    (tmp_path / "configs").mkdir()
    assert shipped("configs") == tmp_path / "configs"


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2024-01-01", r"a timestamp is not taken: put it in quotes if it is text \(line 2, column 4\)"),
        ("a: !!python/object/apply:os.system [ls]", "tags are not taken: leave out .*python/object/apply:os.system"),
        ("a: !!bool maybe", "tags are not taken"),
        (f"a: {'1' * 5000}", r"a number of more than 100 characters \(line 1, column 4\)"),
        (f"a: 1.{'1' * 5000}", "a number of more than 100 characters"),
        ("a: .nan", "a number that is not finite"),
        ("a: [1e400]", r"a number that is not finite \(line 1, column 5\)"),
        ("[" * 1000, "nested deeper than 50 levels"),
        ("- " * 50_000, "nested deeper than 50 levels"),
        ("".join(f"{' ' * level}a:\n" for level in range(300)), "nested deeper than 50 levels"),
        ("a: &a [*a]", r"a holds itself \(line 1, column 8\)"),
        ("a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30)), "more than 5000"),
        ("a: [" + "1, " * 20_000 + "1]", "more than 5000 keys and values"),
        ("".join(f"k{index}: \n" for index in range(14_000)), "more than 5000 keys and values"),
        ("a: " + "x" * 1_000_000, "larger than the 128 kB"),
        ("a: 1\na: " + "x" * 100_000, 'duplicate key "a"'),
        ('a: "\\UFFFFFFFF"', "of no character"),
        ('a: "\\U00110000"', "of no character"),
        ("a: \ud800", "special characters are not allowed|surrogates"),
    ],
    ids=lambda value: value[:20],
)
def test_what_no_configuration_holds_is_refused_soon_and_shortly(text, message):
    """Guards against minutes of reading, values that nobody meant, and messages of megabytes."""
    start = time.process_time()
    with pytest.raises(ValueError, match=f"^not valid YAML: .*{message}") as caught:
        read_yaml(text)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_what_is_no_configuration_file_is_named_and_never_opened(tmp_path):
    """Opening a named pipe waits for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("a: caf\xe9".encode("latin-1"))
    (tmp_path / "zeros.yaml").write_bytes(bytes(200_000))
    messages = {
        "pipe": r"\(it is a named pipe, not a file\)",
        "folder": r"\(it is a folder, not a file\)",
        "latin": r"\(not UTF-8 at byte 6\): save it as UTF-8",
        "zeros": "not valid YAML: larger",
        "absent": "No such file",
    }
    for name, message in messages.items():
        with pytest.raises(ConfigurationError, match=rf"{name}\.yaml: .*{message}"):
            read_yaml_file(tmp_path / f"{name}.yaml")
        with pytest.raises(UserError, match=rf"{name}\.yaml: .*({message}|no such)"):
            parse_arguments((DataArguments,), [str(tmp_path / f"{name}.yaml")])
    with pytest.raises(DetectorLoadError, match="pipe.* is a named pipe"):
        read_model_options(ModelArguments(model_config=str(tmp_path / "pipe.yaml")))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "9" * 400])
def test_numbers_given_as_flags_are_finite(value):
    """NaN passes every check of a range, and shows as a loss that is none."""
    with pytest.raises(UserError, match="--share must be a finite number, got ") as caught:
        parse_arguments((WithShare,), [f"--share={value}"])
    assert len(str(caught.value)) < 250


def test_long_keys_and_values_are_shortened(tmp_path):
    """Guards the one line that a command prints."""
    for text in (
        f"{'k' * 50_000}: 1",
        f"max_train_images: {'x' * 50_000}",
        "? [1, 2]\n: 3",
        "max_train_images: {a: [b]}",
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=r"a\.yaml: ") as caught:
            parse_arguments((DataArguments,), [str(tmp_path / "a.yaml")])
        assert len(str(caught.value)) < 300 + len(str(tmp_path))
