"""What a run was asked to do, as the YAML that makes the commands build its arguments again."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from d3etr_hf.configurations import write_yaml

# of a single call, not of the run
OF_ONE_CALL = "resume_from_checkpoint"
SECRET_ENDINGS = ("token", "secret", "password", "api_key")

# What TrainingArguments.__post_init__ makes of its own defaults: such a value is no choice of the user's.
NORMALISED_DEFAULTS = {
    "accelerator_config": AcceleratorConfig(),
    "activation_checkpointing": False,
    "debug": [],
    "disable_tqdm": False,
    "gradient_checkpointing": False,
    "report_to": [],
}


def describe_run(*instances: Any) -> str:
    """The YAML from which `parse_arguments` builds these dataclasses again.

    Only the values that differ from the defaults are written, no token, secret, password or API key, and not the
    checkpoint from which one call went on.
    """
    values = {}
    for instance in instances:
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            if not field.init or field.name.endswith(SECRET_ENDINGS) or field.name == OF_ONE_CALL:
                continue
            if not _is_default(instance, field, value):
                values[field.name] = _plain(value)
    return write_yaml(values)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _is_default(instance: Any, field: dataclasses.Field, value: Any) -> bool:
    """Whether the field's default leads to `value`."""
    if value == _default(field):
        return True
    if not isinstance(instance, TrainingArguments) or field.name not in NORMALISED_DEFAULTS:
        return False
    # Not so where a subclass has set a default of its own.
    inherited = TrainingArguments.__dataclass_fields__[field.name]
    return _default(field) == _default(inherited) and value == NORMALISED_DEFAULTS[field.name]


def _plain(value: Any) -> Any:
    """`value` in terms of what YAML can write."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return value
