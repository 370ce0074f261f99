"""What annotation tools write into COCO files beside the format's letter, brought into its usual form."""

from typing import Any

from d3etr_hf.data.coco_fields import TOP_LEVEL_KEYS
from d3etr_hf.errors import quoted


def usual_form(coco: Any) -> tuple[Any, list[str]]:
    """The dictionary with numbers for ids that are text, and without categories that only group others.

    Roboflow lists, as category 0, a parent of all classes that no box has; it would be one more class to learn, and
    one that no teacher has. Texts that are numbers become these, others are numbered from 1 in alphabetical order.

    Args:
        coco: the content of a COCO detection JSON, unchecked; it is not changed.

    Returns:
        The dictionary, as it was where it is none of COCO's; and what was done, a sentence each.
    """
    if not isinstance(coco, dict):
        return coco, []
    parts = [coco.get(part) for part in TOP_LEVEL_KEYS]
    if not all(isinstance(part, list) and all(isinstance(entry, dict) for entry in part) for part in parts):
        return coco, []  # which the checks will tell
    coco, notes = _without_parents(coco)
    for part, reference in (("categories", "category_id"), ("images", "image_id")):
        numbers = _numbers([entry.get("id") for entry in coco[part]])
        if numbers:
            coco = _numbered(coco, part, reference, numbers)
            notes.append(f"the ids of `{part}` are text, and read as numbers")
    return coco, notes


def _without_parents(coco: dict) -> tuple[dict, list[str]]:
    categories = coco["categories"]
    used = {repr(annotation.get("category_id")) for annotation in coco["annotations"]}
    of_others = [category.get("supercategory") for category in categories]
    parents = [
        category
        for index, category in enumerate(categories)
        if category.get("supercategory") == "none"
        and repr(category.get("id")) not in used
        and category.get("name") in of_others[:index] + of_others[index + 1 :]
    ]
    if not parents:
        return coco, []
    notes = [
        f"category {quoted(category.get('id'))}, {quoted(category.get('name'))}, is a parent of the others that no "
        "box has, and left out"
        for category in parents
    ]
    return {**coco, "categories": [category for category in categories if category not in parents]}, notes


def _numbers(ids: list) -> dict[str, int]:
    """The number of each id; empty unless all are text."""
    if not all(isinstance(each, str) for each in ids):
        return {}
    if all(each.isascii() and each.isdigit() and len(each) < 19 for each in ids):
        return {each: int(each) for each in ids}
    return {each: number for number, each in enumerate(sorted(set(ids)), 1)}


def _numbered(coco: dict, part: str, reference: str, numbers: dict[str, int]) -> dict:
    def entry(old: dict) -> dict:
        name = {"name": old["id"]} if part == "categories" else {}
        return {**name, **old, "id": numbers[old["id"]]}

    def annotation(old: dict) -> dict:
        given = old.get(reference)
        if isinstance(given, str) and given in numbers:
            return {**old, reference: numbers[given]}
        return old

    return {
        **coco,
        part: [entry(old) for old in coco[part]],
        "annotations": [annotation(old) for old in coco["annotations"]],
    }
