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
        class_names: of all classes, in order of category id; the data's own names in another order are the order of
            the labels, and rename none. None: as the data say.
        renamed: other names for some of these, by the data's; None for none.

    Raises:
        DatasetError: there are more or fewer classes, a class would have the name of another, there is none of a
            name, or two would have one name.
    """
    if class_names is not None and list(class_names) != dataset.class_names:
        if len(class_names) != len(dataset.class_names):
            raise DatasetError(
                f"{dataset.name}: class_names are {len(class_names)} names, but there are "
                f"{len(dataset.class_names)} categories, {quoted(dataset.class_names[:10])}: give a name to each, in "
                "order of their ids."
            )
        if set(class_names) == set(dataset.class_names):
            dataset = dataset.with_class_order(class_names)
        else:
            _refuse_exchanged(dataset, class_names)
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


def _refuse_exchanged(dataset: DetectionDataset, class_names: Sequence[str]) -> None:
    for given, name in zip(class_names, dataset.class_names, strict=True):
        if given != name and given in dataset.class_names:
            raise DatasetError(
                f"{dataset.name}: class_names would call the class {quoted(name)} {quoted(given)}, which is the name "
                f"of another: give the data's names in any order, or new names in the order "
                f"{quoted(dataset.class_names[:10])}; rename_classes renames some."
            )
