"""Configurations: documented options, YAML 1.2 files, and where those are that come with the package."""

from dataclasses import field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

PACKAGE = Path(__file__).resolve().parent


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def shipped_configurations() -> Path:
    """The folder `configs/` that comes with the package: the installed one, or the checkout's."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_configuration(path: str) -> Path:
    """A configuration file by its path, relative to the working directory or to what holds the shipped `configs/`.

    Raises:
        FileNotFoundError: neither is there; the message names both.
    """
    here, shipped = Path(path), shipped_configurations().parent / path
    for place in (here, shipped):
        if place.exists():
            return place
    places = "" if here.is_absolute() else f": neither {here.resolve()} nor {shipped}"
    raise FileNotFoundError(f"no such configuration file{places}")


def read_yaml(text: str) -> Any:
    """What a YAML 1.2 (or JSON) document says: 1e-4 is a number, only true and false are booleans; None if empty.

    Raises:
        ValueError: it is no YAML, or a key is given twice; the message says where.
    """
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"not valid YAML: {error.problem}{place}") from None
    except YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


def write_yaml(values: dict) -> str:
    """The document that `read_yaml` reads back as these values, keys in their order."""
    text = StringIO()
    if values:
        _yaml().dump(values, text)
    return text.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared None there
    return yaml
