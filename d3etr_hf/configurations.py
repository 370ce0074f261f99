"""Configurations: documented options, YAML 1.2 files, and where those are that come with the package."""

from dataclasses import field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from d3etr_hf.errors import ConfigurationError, one_line
from d3etr_hf.files import regular_file
from d3etr_hf.yaml_reading import Composer, Constructor

# A configuration takes a hundredth of it.
MOST_BYTES = 128_000
PACKAGE = Path(__file__).resolve().parent


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def shipped(name: str) -> Path:
    """A folder that comes with the package, `configs` or `model_cards`: the installed one, or the checkout's."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def find_configuration(path: str) -> Path:
    """A configuration file by its path, relative to the working directory or to what holds the shipped `configs/`.

    Raises:
        FileNotFoundError: neither is there; the message names both.
        OSError: what is there is no file.
    """
    here, there = Path(path), shipped("configs").parent / path
    for place in (here, there):
        if place.exists():
            return regular_file(place)
    places = "" if here.is_absolute() else f": neither {here.resolve()} nor {there}"
    raise FileNotFoundError(f"no such configuration file{places}")


def read_yaml_file(path: str | Path) -> Any:
    """What a configuration file says; see `read_yaml`.

    Raises:
        ConfigurationError: there is none, or it is no file, too large, not UTF-8, or no YAML; the message names it.
    """
    try:
        with regular_file(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        return read_yaml(content.decode())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read as a configuration file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path}: cannot be read as a configuration file (not UTF-8 at byte {error.start}): save it as UTF-8"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def read_yaml(text: str) -> Any:
    """What a YAML 1.2 (or JSON) document says: 1e-4 is a number, only true and false are booleans; None if empty.

    Only what configurations are made of is read: text, finite numbers, booleans, null, lists and mappings.

    Raises:
        ValueError: it is no YAML, a key is given twice, it holds something else (dates, tags), or more than
            any configuration does; the message says where, in one line.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"not valid YAML: larger than the {MOST_BYTES // 1000} kB that a configuration may take")
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"not valid YAML: {one_line(error.problem)}{place}") from None
    except YAMLError as error:
        raise ValueError(f"not valid YAML: {one_line(error)}") from None
    except (ValueError, OverflowError) as error:  # of chr(), which of the two depends on Python
        raise ValueError(
            f"not valid YAML: a value that cannot be read, such as a \\U of no character ({one_line(error)})"
        ) from None


def write_yaml(values: dict) -> str:
    """The document that `read_yaml` reads back as these values, keys in their order."""
    text = StringIO()
    if values:
        _yaml().dump(values, text)
    return text.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Constructor = Composer, Constructor
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared None there
    return yaml
