"""The weights of a checkpoint: which files are read, and what their tensors must be."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from logging import Filter, LogRecord
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from d3etr_hf.errors import DamagedFileError, DetectorLoadError, one_line, quoted
from d3etr_hf.files import read_json

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
AGAIN = "copy or download the checkpoint again"
# of safetensors' names of types
FLOATING = re.compile(r"B?F\d")
COUNTER = "num_batches_tracked"  # a frozen batch norm counts nothing, and files have it all the same
SHOWN = 3
# what wrappers put before the names of tensors: DataParallel, torch.compile, Lightning, a module of one's own
WRAPPERS = ("module.", "_orig_mod.", "model.")
# who reports tensors that do not fit, and words of the report
REPORTS = {"transformers.modeling_utils": "LOAD REPORT", "d3etr_hf.models.detector": "start afresh"}

logger = logging.get_logger(__name__)


class _WithoutReports(Filter):
    def filter(self, record: LogRecord) -> bool:
        return not any(words in record.getMessage() for words in REPORTS.values())


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Tensors that do not fit are not listed, by Transformers' table or otherwise: `check_loaded` names them.

    All other warnings are heard.
    """
    reporting, quiet = [logging.get_logger(name) for name in REPORTS], _WithoutReports()
    for each in reporting:
        each.addFilter(quiet)
    try:
        yield
    finally:
        for each in reporting:
            each.removeFilter(quiet)


def check_weight_files(path: str, what: str, model: nn.Module) -> dict[str, str]:
    """Refuse weights that are no safetensors, lie elsewhere, or hold other numbers than a model's.

    Whole numbers and complex ones would be taken for weights in silence.

    Args:
        path: a folder or Hub id, whose files are downloaded.
        what: the checkpoint, as the errors call it.
        model: of the checkpoint's configuration; may be on the meta device.

    Returns:
        `from_pretrained`'s `key_mapping` that takes away what wrappers put before every name, which is told by one
        warning; empty as a rule.

    Raises:
        DetectorLoadError: the message names the file.
    """
    found: set[str] = set()
    whole = {name.rpartition(".")[2] for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    for file in _weight_files(path, what):
        try:
            with safe_open(file, "pt") as tensors:
                kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise DetectorLoadError(
                f"{what}: the weights could not be read: {file.name} is damaged ({one_line(error)}); {AGAIN}"
            ) from error
        wrong = {
            name: kind
            for name, kind in kinds.items()
            if not FLOATING.match(kind) and name.rpartition(".")[2] not in whole | {COUNTER}
        }
        _refuse(what, file.name, [f"{name} ({kind})" for name, kind in wrong.items()], "no floating point numbers")
        found |= kinds.keys()
    prefix = _prefix_of_wrappers(found)
    if not prefix:
        return {}
    logger.warning(
        f"{what}: all names of its tensors begin with {prefix!r}, as a wrapper (DataParallel, torch.compile and the "
        "like) calls them: read without it"
    )
    return {f"^{re.escape(prefix)}": ""}


def _prefix_of_wrappers(names: Collection[str]) -> str:
    """What all names of tensors begin with that no detector calls its own parts."""
    prefix = ""
    while names:
        for wrapper in WRAPPERS:
            # detectors have a part that is called model, but none within it
            twice = wrapper != "model." or any(name.startswith("model.model.") for name in names)
            if twice and all(name.startswith(wrapper) for name in names):
                prefix, names = prefix + wrapper, [name.removeprefix(wrapper) for name in names]
                break
        else:
            return prefix
    return prefix


def _weight_files(path: str, what: str) -> list[Path]:
    """One file, or all that an index names."""
    reason = ""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            found = Path(cached_file(path, name))
        except OSError as error:
            reason = one_line(error)
            continue
        if name == SAFE_WEIGHTS_NAME:
            return [found]
        return [_shard(path, found, shard, what) for shard in _shards(found, what)]
    if not Path(path).is_dir():
        raise DetectorLoadError(
            f"{what}: no {SAFE_WEIGHTS_NAME} could be read from the Hub ({reason}); of a repository that has pickles "
            "alone, download the folder and convert it: d3etr convert FOLDER/pytorch_model.bin NEW_FOLDER"
        )
    pickles = sorted(file.name for file in Path(path).iterdir() if file.suffix in PICKLES)
    if pickles:
        raise DetectorLoadError(
            f"{what}: its weights are a pickle ({quoted(pickles[0])}), which could run code and is not read; convert "
            f"it: d3etr convert {Path(path) / pickles[0]} NEW_FOLDER"
        )
    raise DetectorLoadError(f"{what}: the weights could not be read: there is no {SAFE_WEIGHTS_NAME}; {AGAIN}")


def _shards(index: Path, what: str) -> list[str]:
    """The files that an index names: plain names, so that nothing outside the checkpoint is read."""
    try:
        content = read_json(index, AGAIN)
    except (DamagedFileError, OSError) as error:
        raise DetectorLoadError(f"{what}: {index.name} cannot be read ({one_line(error)}); {AGAIN}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise DetectorLoadError(f"{what}: {index.name} must say in weight_map which file holds a tensor; {AGAIN}")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name or name == ".." or "\\" in name]:
        raise DetectorLoadError(
            f"{what}: {index.name} names a file outside the checkpoint, {quoted(outside[0])}, which is not read"
        )
    if pickles := [name for name in names if not name.endswith(".safetensors")]:
        raise DetectorLoadError(f"{what}: {index.name} names {quoted(pickles[0])}, which is no safetensors file")
    return names


def _shard(path: str, index: Path, name: str, what: str) -> Path:
    try:
        return Path(cached_file(path, name))
    except OSError as error:
        raise DetectorLoadError(f"{what}: {index.name} names {quoted(name)}, which is not there; {AGAIN}") from error


def check_loaded(model: nn.Module, info: dict, what: str) -> None:
    """Refuse a model that its checkpoint does not fill, or whose layers have more in it than in the model.

    A layer that the configuration leaves out, or a part that a layer does not have, is of another architecture. Other
    tensors besides, outside of the model's layers, as of another head, are left out with one warning; batch norm's
    counters, buffers that a model computes itself, and what the model's class says may be there, without.

    Args:
        model: the model, loaded.
        info: what `from_pretrained` says of the loading, with `ignore_mismatched_sizes`.
        what: the checkpoint, as the errors call it.

    Raises:
        DetectorLoadError: the message has the first three tensors.
    """
    own = {name for name, _ in model.named_buffers()}
    modules = {name for name, _ in model.named_modules()}
    unexpected = [key for key in info["unexpected_keys"] if key not in own and key.rpartition(".")[2] != COUNTER]
    of_layers = [key for key in unexpected if _is_of_a_layer(key, modules)]
    shapes = [f"{key} {list(there)} for {list(here)}" for key, there, here in info["mismatched_keys"]]
    for tensors, problem in (
        (info["missing_keys"], "missing"),
        (shapes, "of another shape than config.json says"),
        (of_layers, "of layers of another architecture than config.json says"),
    ):
        _refuse(what, "the weights", tensors, problem)
    check_finite(model, what)
    if unexpected:
        logger.warning(
            f"{what}: the weights: {len(unexpected)} tensors are of no part of the model and left out, the first "
            f"{_first(unexpected)}"
        )


def _is_of_a_layer(tensor: str, modules: set[str]) -> bool:
    """Whether a tensor is named as of an entry of one of the model's lists of layers, be it there or not."""
    parts = tensor.split(".")
    return any(part.isdigit() and ".".join(parts[:place]) in modules for place, part in enumerate(parts) if place)


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse weights that are NaN or infinite, of a training that diverged.

    Raises:
        DetectorLoadError: the message has the first three tensors.
    """
    values = model.state_dict().items()
    broken = [name for name, value in values if value.is_floating_point() and not torch.isfinite(value).all()]
    _refuse(
        what,
        "the weights",
        broken,
        "not finite",
        f"as after a training that diverged: take an earlier one, or {AGAIN}",
    )


def _refuse(what: str, file: str, tensors: Collection[str], problem: str, remedy: str = AGAIN) -> None:
    if tensors:
        raise DetectorLoadError(
            f"{what}: {file}: {len(tensors)} tensors are {problem}, the first {_first(tensors)}; {remedy}"
        )


def _first(tensors: Collection[str]) -> str:
    return ", ".join(one_line(name) for name in sorted(tensors)[:SHOWN])
