"""What a checkpoint's config.json says, checked before Transformers makes a configuration of it."""

from collections import Counter
from typing import Any

from transformers import CONFIG_MAPPING

from d3etr_hf.errors import DetectorLoadError, quoted

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
    for name in ("attn_implementation", "_attn_implementation"):
        if fields.get(name) not in ATTENTION:
            raise DetectorLoadError(
                f"{what}: {name} is {quoted(fields[name])} in its config.json: detectors know eager and sdpa"
            )
    if fields.get("id2label") is not None:
        _check_names(fields["id2label"], what)


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
