"""Pretrained weights for the backbone of a new detector."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from d3etr_hf.errors import DetectorLoadError, quoted
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.field_values import check_field_values
from d3etr_hf.models.trial import build_on_meta, library_errors
from d3etr_hf.models.weight_files import check_finite, check_weight_files


@torch.no_grad()
def load_backbone_weights(model: Detector, path: str) -> None:
    """Fill the backbone with pretrained weights, batch norm statistics included.

    Args:
        path: a folder or Hub id of any checkpoint of the same architecture, such as an image classifier.

    Raises:
        DetectorLoadError: they cannot be read, or are of another architecture.
    """
    backbone: Any
    backbone, config = model.backbone_module, model.config.backbone_config
    what = f"backbone_weights {path!r}"
    if config.model_type == "timm_backbone":
        raise DetectorLoadError(
            f"backbone_weights {path!r} go into a backbone of Transformers' own, and model_config has a timm "
            "backbone: set backbone_config, for example to {model_type: resnet, out_features: [stage4]}"
        )
    loaded, info = _read(path, type(backbone), config, what)
    ours, theirs = backbone.state_dict(), loaded.state_dict()
    # a classifier has no norms of single stages: they keep their start value, the identity
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("hidden_states_norms."))
    counters = {name for name in theirs if name.endswith("num_batches_tracked")}  # a frozen batch norm counts nothing
    different = sorted(ours.keys() ^ (theirs.keys() - counters)) or sorted(
        name for name, value in ours.items() if theirs[name].shape != value.shape
    )
    if missing or different:
        raise DetectorLoadError(
            f"backbone_weights {path!r} do not fit backbone_config: {len(missing)} tensors are missing and "
            f"{len(different)} differ, the first {(missing + different)[:3]}; {_differences(config, loaded.config)}"
        )
    check_finite(loaded, what)
    backbone.load_state_dict({name: theirs[name] for name in ours}, strict=True)
    _refuse_other_computation(backbone, loaded, path, config)


def _read(path: str, backbone_class: Any, config: PreTrainedConfig, what: str) -> tuple[Any, dict]:
    """The backbone of a checkpoint of the same type, and what Transformers says of its loading."""
    with library_errors(f"{what} cannot be read"):
        fields, _ = PreTrainedConfig.get_config_dict(path)
    if fields.get("model_type") != config.model_type:
        raise DetectorLoadError(
            f"{what} are of a {quoted(fields.get('model_type'))} model, model_config has a {config.model_type!r} "
            "backbone: make the two agree"
        )
    check_field_values(fields, type(config), f"{what}: config.json")
    with library_errors(f"{what} cannot be read"):
        names = check_weight_files(path, what, build_on_meta(backbone_class, type(config).from_dict(fields), what))
        # not AutoBackbone.from_pretrained, which asks the Hub first and refuses folders
        return backbone_class.from_pretrained(
            path,
            out_features=config.out_features,
            key_mapping=names or None,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
        )


def _refuse_other_computation(backbone, loaded, path: str, config: PreTrainedConfig) -> None:
    """Strides, activations and the like show in no shape: the two must compute the same of a random image."""
    pixels = torch.rand(1, config.num_channels, 128, 128, generator=torch.Generator().manual_seed(0))
    pixels, loaded = pixels.to(backbone.device), loaded.to(backbone.device)
    was_training = backbone.training
    own, expected = (part.eval()(pixels).feature_maps[-1] for part in (backbone, loaded))
    backbone.train(was_training)
    if own.shape != expected.shape or (own - expected).abs().max() > 0.01 * expected.abs().max():
        raise DetectorLoadError(
            f"backbone_weights {path!r} were trained in a backbone that computes something else than backbone_config "
            f"says; {_differences(config, loaded.config)}"
        )


def _differences(config: PreTrainedConfig, loaded: PreTrainedConfig) -> str:
    """The fields in which two backbone configurations differ, for a message."""
    ours, theirs = config.to_diff_dict(), loaded.to_diff_dict()
    aside = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version"}
    names = [name for name in sorted(ours.keys() | theirs.keys()) if name not in aside]
    found = [
        f"{name} ({getattr(config, name)!r} here, {getattr(loaded, name)!r} there)"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    return f"the configurations differ in {', '.join(found)}" if found else "the configurations are equal"
