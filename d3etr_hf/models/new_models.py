"""New detectors from a `model_config`: every value is checked before anything is built of them."""

import difflib
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from d3etr_hf.configurations import find_configuration, read_yaml_file
from d3etr_hf.errors import ConfigurationError, DetectorLoadError, quoted
from d3etr_hf.models.configuration_checks import check_attention, check_backbone
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.families import DEFAULT_FAMILY, family_of_type
from d3etr_hf.models.field_values import check_field_values
from d3etr_hf.models.timm_names import refuse_missing_timm
from d3etr_hf.models.trial import FIELD_ERRORS, build_errors, build_on_meta, try_detector


def read_model_config(path: str) -> dict:
    """The options in a YAML or JSON file.

    Raises:
        DetectorLoadError: it cannot be read.
    """
    try:
        return read_yaml_file(find_configuration(path))
    except (ConfigurationError, OSError) as error:
        raise DetectorLoadError(f"model_config {path!r} cannot be read ({error}): give a YAML or JSON file") from error


def new_model(options: Any, class_names: list[str], place: str) -> Detector:
    """A detector from fields of its configuration.

    Args:
        options: the fields, and `model_type`.
        class_names: in the order of its outputs.
        place: where the options are from, as the errors call it.

    Raises:
        DetectorLoadError: no detector can be built of them.
    """
    check_model_options(options, place)
    options = dict(options)
    model_type = options.pop("model_type", DEFAULT_FAMILY)
    family, id2label = family_of_type(model_type, place), dict(enumerate(class_names))
    with build_errors(place, FIELD_ERRORS):
        config = CONFIG_MAPPING[model_type](
            **options, id2label=id2label, label2id={name: index for index, name in id2label.items()}
        )
    refuse_missing_timm(config, place, "a new model builds it by timm itself")
    with build_errors(place, (ValueError,)):
        family.check_config(config)
    build_on_meta(family, config, place)
    with build_errors(place):
        model = family(config)
    try_detector(model, place)
    return model


def check_model_options(options: Any, place: str) -> None:
    """Transformers would keep an unknown key in silence, and take timm's ResNet-50 where no backbone is given.

    Args:
        options: as `new_model`.
        place: where they are from, as the errors call it.

    Raises:
        DetectorLoadError: they hold what no model has.
    """
    if not isinstance(options, dict):
        raise DetectorLoadError(f"{place} must hold fields of a model's configuration, holds {quoted(options)}")
    if given := sorted({"id2label", "label2id", "num_labels"} & set(options)):
        raise DetectorLoadError(f"{place} holds {given}: leave them out, the classes are the data set's")
    model_type = options.get("model_type", DEFAULT_FAMILY)
    family_of_type(model_type, place)
    config_class = CONFIG_MAPPING[model_type]
    _refuse_unknown(options, config_class, f"{place}: ")
    backbone = options.get("backbone_config")
    check_backbone(backbone, place)
    backbone_class = CONFIG_MAPPING[backbone["model_type"]]
    _refuse_unknown(backbone, backbone_class, f"{place}: backbone_config: ", set(backbone_class.attribute_map))
    check_attention(options, place)
    check_field_values(options, config_class, place)


def _refuse_unknown(
    options: dict, config_class: type[PreTrainedConfig], place: str, aliases: frozenset | set = frozenset()
) -> None:
    known = sorted(set(config_class().to_dict()) | aliases)
    unknown = sorted(map(str, set(options) - set(known)))
    if not unknown:
        return
    nearest = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    meant = ", ".join(f"{found[0]!r} for {quoted(name)}" for name, found in nearest.items() if found)
    hint = f"; did you mean {meant}?" if meant else ""
    raise DetectorLoadError(f"{place}{config_class.__name__} has no {quoted(unknown)}{hint}")
