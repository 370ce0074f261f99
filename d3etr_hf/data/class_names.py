"""The names of a data set's classes, as an option gives them."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from d3etr_hf.data.dataset import DetectionDataset
from d3etr_hf.errors import DatasetError, quoted


def with_names(
    dataset: DetectionDataset, class_names: Sequence[str] | None, renamed: Mapping[str, str] | None
) -> DetectionDataset:
    """A split whose classes have the names that were given.

    Args:
        dataset: a split.
        class_names: of all classes, in order of category id; None: as the data say.
        renamed: other names for some of these, by the data's; None for none.

    Raises:
        DatasetError: there are more or fewer classes, there is none of a name, or two would have one name.
    """
    if class_names is not None and list(class_names) != dataset.class_names:
        if len(class_names) != len(dataset.class_names):
            raise DatasetError(
                f"{dataset.name}: class_names are {len(class_names)} names, but there are "
                f"{len(dataset.class_names)} categories, {quoted(dataset.class_names[:10])}: give a name to each, in "
                "order of their ids."
            )
        dataset = dataset.with_class_names(list(class_names))
    for name in renamed or ():
        if name not in dataset.class_names:
            nearest = difflib.get_close_matches(name, dataset.class_names, n=1)
            hint = (
                f"did you mean {quoted(nearest[0])}?" if nearest else f"there are {quoted(dataset.class_names[:10])}"
            )
            raise DatasetError(f"{dataset.name}: rename_classes names {quoted(name)}, which is no class; {hint}")
    if renamed:
        dataset = dataset.with_class_names([renamed.get(name, name) for name in dataset.class_names])
    name, count = Counter(dataset.class_names).most_common(1)[0]
    if count > 1:
        raise DatasetError(f"{dataset.name}: {count} classes are named {quoted(name)}: give each a name of its own.")
    return dataset
