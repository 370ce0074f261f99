"""The arguments of every command: `[configuration.yaml] [--field value ...]`.

Flags override the YAML file, the YAML file overrides the defaults of the dataclasses. Whatever is not understood is
refused, with the file and the key or flag named.
"""

import dataclasses
import difflib
import json
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import HfArgumentParser

from d3etr_hf.configurations import find_configuration, read_yaml_file
from d3etr_hf.errors import CommandLineError, ConfigurationError, one_line, quoted
from d3etr_hf.training.training_arguments import RENAMED_OPTIONS

NOT_GIVEN = object()


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: list[str] | None = None,
    description: str = "",
    first_argument: str | None = None,
    adjust: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
) -> tuple[Any, ...]:
    """Reads `[configuration.yaml] [--field value ...]` into one instance of each dataclass, in their order.

    The file is looked for in the working directory, then beside the configurations that come with the package. Fields
    that hold a dictionary take a YAML mapping in the file and a JSON object on the command line; `null` takes back
    what the file says of a text that may be left out. Paths stay as they are given. `--help` prints every field and
    ends the program.

    Args:
        dataclass_types: dataclasses with no field name in common; `metadata["help"]` documents a field.
        argv: the arguments after the command's name; `sys.argv[1:]` where None.
        description: printed as it is at the top of `--help`.
        first_argument: a field whose value may be given first, in the place of the configuration file.
        adjust: called with what the file holds, which it may change, and with what the flags say, both by field name.

    Raises:
        CommandLineError: an unknown key or flag, a missing or wrong value, an unreadable file, or a combination that
            a dataclass's own checks refuse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if first_argument is not None and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{first_argument}")
    fields = _fields_by_name(dataclass_types)
    configuration_file = argv.pop(0) if argv and not argv[0].startswith("-") else None
    # Flags first, so that --help works beside a broken file.
    values = _read_flags(dataclass_types, argv, fields, description, first_argument or "configuration.yaml")
    if configuration_file is not None:
        of_file = _read_configuration_file(configuration_file, fields)
        if adjust is not None:
            adjust(of_file, values)
        values = {**of_file, **values}

    source = configuration_file or "command line"
    return tuple(_build(dataclass_type, values, source) for dataclass_type in dataclass_types)


def build_arguments(dataclass_types: Sequence[type], options: dict[str, Any], place: str) -> tuple[Any, ...]:
    """One instance of each dataclass from options by name, just as from a configuration file that holds them.

    Args:
        dataclass_types: as in `parse_arguments`.
        options: what the file would hold.
        place: where the options stand, as the errors call it.

    Raises:
        CommandLineError: as in `parse_arguments`.
    """
    values = _convert_options(options, _fields_by_name(dataclass_types), place)
    return tuple(_build(dataclass_type, values, place) for dataclass_type in dataclass_types)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the line breaks of the description alone."""


class _FlagParser(HfArgumentParser):
    """Reads flags alone: what is required may still come from the file, and dictionaries are read afterwards."""

    def add_argument(self, *names, **kwargs):
        if kwargs.pop("required", False):
            kwargs["default"] = SUPPRESS
            kwargs["help"] = f"{kwargs.get('help', '')} (required)"
        kind = kwargs.get("type")
        if dict in (kind, get_origin(kind)):
            kwargs["type"] = str
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        # Not argparse's own way out: its message comes after a list of all of some 150 flags.
        raise CommandLineError(message)


def _read_flags(
    dataclass_types: Sequence[Any], argv: list[str], fields: dict[str, Any], description: str, first_argument: str
) -> dict[str, Any]:
    """The values of the flags in `argv`, by field name; the fields that no flag names are left out."""
    parser = _FlagParser(
        dataclass_types,
        description=description,
        usage=f"%(prog)s [{first_argument}] [--field value ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    namespace, unknown = parser.parse_known_args(argv, Namespace(**dict.fromkeys(fields, NOT_GIVEN)))
    if unknown:
        flags = [argument.split("=")[0] for argument in unknown if argument.startswith("--")]
        if not flags:
            raise CommandLineError(
                f"unexpected argument '{unknown[0]}': "
                "one configuration file may come first, everything after it is --field value"
            )
        name = flags[0].removeprefix("--").replace("-", "_")
        raise CommandLineError(f"unknown flag '{flags[0]}'{_suggestion(name, list(fields), prefix='--')}")

    values = {name: value for name, value in vars(namespace).items() if value is not NOT_GIVEN}
    for name, value in values.items():
        if value == "null" and type(None) in get_args(fields[name]):
            values[name] = None  # takes back what the file says
            continue
        if _admits_dictionary(fields[name]) and isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise CommandLineError(f"--{name}: not valid JSON ({error}): {one_line(value)}") from None
        values[name] = _convert(value, fields[name], f"--{name}")
    return values


def _build(dataclass_type: type, values: dict[str, Any], source: str) -> Any:
    """An instance with those of the values that are its own."""
    own_fields = [field for field in dataclasses.fields(dataclass_type) if field.init]
    for field in own_fields:
        if field.name not in values and not _has_default(field):
            raise CommandLineError(
                f"'{field.name}' is required: set it in the configuration file or with --{field.name}"
            )
    try:
        return dataclass_type(**{field.name: values[field.name] for field in own_fields if field.name in values})
    except ValueError as error:
        raise CommandLineError(f"{source}: {error}") from error


def _read_configuration_file(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The values in a YAML file, by field name, converted to the types of the fields."""
    try:
        content = read_yaml_file(find_configuration(path))
    except ConfigurationError as error:
        raise CommandLineError(str(error)) from None
    except FileNotFoundError as error:
        raise CommandLineError(f"{path}: {error}") from None
    except OSError as error:
        raise CommandLineError(f"{path}: cannot be read as a configuration file ({error.strerror})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise CommandLineError(f"{path}: must hold 'key: value' lines, holds a {type(content).__name__}")
    return _convert_options(content, fields, path)


def _convert_options(options: dict[str, Any], fields: dict[str, Any], place: str) -> dict[str, Any]:
    """The options, all of them known, converted to the types of the fields."""
    for key in options:
        if key not in fields:
            raise CommandLineError(f"{place}: unknown key '{one_line(key)}'{_suggestion(str(key), list(fields))}")
    return {key: _convert(value, fields[key], f"{place}: '{key}'") for key, value in options.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as an instance of the type `hint`."""
    try:
        converted = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        if error.errors()[0]["type"] == "finite_number":
            raise CommandLineError(f"{where} must be a finite number, got {quoted(value)}") from None
        converted = NOT_GIVEN
    # pydantic would take true for the number 1.
    if converted is NOT_GIVEN or (isinstance(value, bool) and type(converted) in (int, float)):
        type_name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise CommandLineError(f"{where} must be of type {type_name}, got {quoted(value)} ({type(value).__name__})")
    return converted


def _fields_by_name(dataclass_types: Sequence[type]) -> dict[str, Any]:
    """The type hint of every field that can be set, by field name."""
    fields = {}
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        fields.update({field.name: hints[field.name] for field in dataclasses.fields(dataclass_type) if field.init})
    return fields


def _admits_dictionary(hint: Any) -> bool:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(dict in (member, get_origin(member)) for member in members)


def _suggestion(unknown: str, known: list[str], prefix: str = "") -> str:
    if RENAMED_OPTIONS.get(unknown) in known:
        return f": it is called '{prefix}{RENAMED_OPTIONS[unknown]}' now"
    nearest = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean '{prefix}{nearest[0]}'?" if nearest else "; --help lists those there are"


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
