"""What a checkpoint's config.json says, checked before Transformers makes a configuration of it."""

from collections import Counter
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from d3etr_hf.errors import DetectorLoadError, quoted
from d3etr_hf.models.field_values import check_field_values

# of outputs that no class uses, which public checkpoints name alike (COCO's 91 numbers for 80 classes)
UNUSED = "n/a"
ATTENTION = (None, "eager", "sdpa")


def check_fields(fields: Any, what: str) -> None:
    """Refuse what Transformers would stumble over later, ask about, or take for something else.

    Args:
        fields: what config.json holds.
        what: the checkpoint, as the errors call it.

    Raises:
        DetectorLoadError: the message names the checkpoint, the field and its value.
    """
    if not isinstance(fields, dict):
        raise DetectorLoadError(f"{what}: config.json must hold a model's fields, and holds a {type(fields).__name__}")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = ", and code that comes with a checkpoint is never run" if "auto_map" in fields else ""
        raise DetectorLoadError(
            f"{what}: model_type is {quoted(model_type)} in its config.json, which Transformers does not "
            f"know{own_code}"
        )
    if fields.get("quantization_config") is not None:
        raise DetectorLoadError(
            f"{what}: quantization_config in its config.json: quantised detectors are not supported; take the "
            "checkpoint that was quantised"
        )
    place = f"{what}: config.json"
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise DetectorLoadError(f"{place}: architectures is {quoted(architectures)}, and must name classes in a list")
    check_attention(fields, place)
    if fields.get("backbone_config") is not None:
        check_backbone(fields["backbone_config"], place)
    check_field_values(fields, CONFIG_MAPPING[model_type], place)
    if fields.get("id2label") is not None:
        _check_names(fields["id2label"], what)


def check_backbone(backbone: Any, place: str) -> None:
    """Refuse the configuration of a backbone that does not say which one, or says one that does not exist.

    Raises:
        DetectorLoadError: the message has those that there are.
    """
    known = list(MODEL_FOR_BACKBONE_MAPPING_NAMES)
    if not isinstance(backbone, dict) or backbone.get("model_type") not in known:
        raise DetectorLoadError(
            f"{place}: backbone_config is {quoted(backbone)}; it must say which backbone, for example "
            f"{{model_type: resnet, out_features: [stage4]}}; there are {', '.join(known)}"
        )


def check_attention(fields: dict[str, Any], place: str) -> None:
    """Refuse attention that detectors do not have, in a configuration or in its backbone's.

    Raises:
        DetectorLoadError: the message names the field and its value.
    """
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in ("attn_implementation", "_attn_implementation"):
            if part.get(name) not in ATTENTION:
                raise DetectorLoadError(f"{place}: {name} is {quoted(part[name])}: detectors know eager and sdpa")


def _check_names(id2label: Any, what: str) -> None:
    """Names must be of the outputs 0, 1, ..., and tell them apart."""
    place = f"{what}: id2label in its config.json"
    if not isinstance(id2label, dict) or not id2label:
        raise DetectorLoadError(f"{place} must give a name to each class, and is {quoted(id2label)}")
    try:
        numbers = sorted(int(key) for key in id2label)
    except (TypeError, ValueError) as error:
        raise DetectorLoadError(f"{place} has a key that is no whole number ({error})") from error
    if numbers != list(range(len(numbers))):
        wrong = next((number for place, number in enumerate(numbers) if number != place), numbers[-1])
        raise DetectorLoadError(
            f"{place} has {len(numbers)} keys, which must be 0 to {len(numbers) - 1}, each once; {wrong} is out of "
            "line: number the classes in the order of the outputs"
        )
    if not all(isinstance(name, str) for name in id2label.values()):
        raise DetectorLoadError(f"{place} has a name that is no text: {quoted(list(id2label.values()))}")
    counts = Counter(name.strip().casefold() for name in id2label.values())
    counts.pop(UNUSED, None)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DetectorLoadError(
            f"{place} names {len(twice)} classes twice, as {quoted(twice[0])}: make them unique (outputs that "
            "no class uses may all be called N/A)"
        )
