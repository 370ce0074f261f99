"""A trained detector's class heads for the classes of other data."""

from collections import Counter

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from d3etr_hf.models.detector import Detector, class_names_of

logger = logging.get_logger(__name__)


@torch.no_grad()
def with_new_classes(model: Detector, names: list[str]) -> Detector:
    """A detector of these classes that goes on from the model's weights.

    Everything is copied, of class heads (and embeddings of classes, where a family has such) the rows of classes that
    the model knows by the same name, case and surrounding space aside, and of what is no class, such as no object. The
    other rows start as the family's authors start them.

    Args:
        model: of any classes; it is left as it is.
        names: the new classes, in the order of the outputs.
    """
    theirs = class_names_of(model.config)
    fresh = type(model)(_config_of(model, names))
    index = _rows_by_name(theirs, names)
    kept = [label for label, row in enumerate(index) if row is not None]
    rows = [row for row in index if row is not None]
    dimensions, source = class_dimensions(model), model.state_dict()
    for name, value in fresh.state_dict().items():
        if name not in dimensions:
            value.copy_(source[name])
            continue
        if name.startswith(model.nameless_outputs):
            shared = min(len(theirs), len(names))
            value[:shared] = source[name][:shared]
            continue
        dimension = dimensions[name]
        further = list(range(source[name].shape[dimension] - len(theirs)))
        places = torch.tensor(kept + [len(names) + offset for offset in further], dtype=torch.int64)
        taken = torch.tensor(rows + [len(theirs) + offset for offset in further], dtype=torch.int64)
        value.index_copy_(dimension, places, source[name].index_select(dimension, taken))
    afresh = [name for name, row in zip(names, index, strict=True) if row is None]
    logger.info(
        f"new_head: of {len(names)} classes {len(kept)} go on from the model's own of the same name, "
        f"{len(afresh)} start afresh: {afresh}"
    )
    return fresh


def class_dimensions(model: Detector) -> dict[str, int]:
    """The tensors whose shapes depend on the number of classes, by name, and in which dimension they do."""
    names = class_names_of(model.config)
    with torch.device("meta"):
        few, many = (
            model.stock_class(_config_of(model, [*names, *further])).state_dict() for further in ([], ["one more"])
        )
    return {
        name: next(dimension for dimension, size in enumerate(value.shape) if size != many[name].shape[dimension])
        for name, value in few.items()
        if value.shape != many[name].shape
    }


def _config_of(model: Detector, names: list[str]) -> PreTrainedConfig:
    """A copy of the model's configuration with other classes."""
    fields = model.config.to_dict()
    fields |= {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    return type(model.config).from_dict(fields)


def _rows_by_name(theirs: list[str], names: list[str]) -> list[int | None]:
    """The row of each name among theirs; None where it is not there, or more than once."""
    keys = [str(name).strip().casefold() for name in theirs]
    counts = Counter(keys)
    wanted = [str(name).strip().casefold() for name in names]
    return [keys.index(key) if counts[key] == 1 else None for key in wanted]
