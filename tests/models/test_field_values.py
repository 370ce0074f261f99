"""Values of fields that no detector has: one line that names them, in a checkpoint and in a model_config alike."""

import json
import math

import pytest
from transformers import DetrConfig

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.field_values import check_field_values
from d3etr_hf.models.loading import FAMILIES, ModelArguments, build_model, load_detector
from scripts.walk_configurations import as_model_config, walk
from tests.tiny import tiny_config, tiny_model

CLASSES = ["circle", "rectangle", "triangle"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each family, made when it is asked for."""
    root = tmp_path_factory.mktemp("detectors")

    def folder_of(family):
        if not (root / family).exists():
            tiny_model(model_type=family).save_pretrained(root / family)
        return root / family

    return folder_of


BACKBONE = {
    "model_type": "convnext",
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_stages": 2,
    "out_features": ["stage2"],
}


@pytest.mark.parametrize("source", ["checkpoint", "model_config"])
@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("conditional_detr", {"d_model": 0}, "d_model is 0: must be 1 or more"),
        ("conditional_detr", {"d_model": 2**70}, "d_model is 1180591620717411303424: must be at most 8,192"),
        ("conditional_detr", {"decoder_layers": -1}, "decoder_layers is -1: must not be negative"),
        ("conditional_detr", {"encoder_layers": 10**6}, "encoder_layers is 1000000: must be at most 256"),
        ("conditional_detr", {"num_queries": 0}, "num_queries is 0: must be 1 or more"),
        (
            "conditional_detr",
            {"decoder_attention_heads": 5},
            "d_model 32 must be a multiple of decoder",
        ),
        ("conditional_detr", {"dropout": 7}, "dropout is 7: must be from 0 to 1"),
        ("conditional_detr", {"attention_dropout": -0.5}, "attention_dropout is -0.5: must be from 0 to 1"),
        ("conditional_detr", {"init_std": math.nan}, "init_std is nan: must be finite"),
        ("conditional_detr", {"class_cost": True}, "class_cost is True: must be a number"),
        ("conditional_detr", {"activation_function": "rely"}, "activation_function is 'rely', which is no activation"),
        ("conditional_detr", {"position_embedding_type": "none"}, "no model can be built .*none"),
        ("conditional_detr", {"to_dict": 3}, "to_dict"),
        ("detr", {"d_model": "wide"}, "'d_model' expected int, got str"),
        ("detr", {"d_model": [32]}, "'d_model' expected int, got list"),
        ("detr", {"d_model": None}, "'d_model' expected int, got NoneType"),
        ("detr", {"backbone_config": {**BACKBONE, "num_channels": 0}}, "num_channels is 0"),
        ("detr", {"backbone_config": {**BACKBONE, "hidden_act": "x"}}, "hidden_act is 'x'"),
        ("detr", {"backbone_config": {**BACKBONE, "out_features": ["stage9"]}}, "stage9"),
        (
            "detr",
            {"backbone_config": {**BACKBONE, "depths": [10**6, 1]}},
            "depths is .*most",
        ),
        (
            "detr",
            {"backbone_config": {**BACKBONE, "dtype": 10000}},
            "dtype is 10000, which is no precision of weights",
        ),
        ("detr", {"backbone_config": {**BACKBONE, "dtype": "int8"}}, "dtype is 'int8', which is no precision"),
        ("detr", {"backbone_config": {"model_type": "nothing"}}, "backbone_config is .*there are .*resnet"),
        ("detr", {"backbone_config": {"model_type": "bert"}}, "backbone_config is .*there are .*resnet"),
        ("detr", {"backbone_config": [3]}, r"backbone_config is \[3\]"),
        ("rt_detr", {"feat_strides": [4]}, "feat_strides"),
        ("rt_detr", {"feat_strides": [8, 16]}, r"feat_strides \[8, 16\] are not the backbone's"),
        ("rt_detr", {"feat_strides": [0, 8]}, r"feat_strides is \[0, 8\]: must be 1 or more"),
        ("rt_detr", {"encoder_in_channels": [8, 16, 32]}, "encoder_in_channels"),
        ("rt_detr", {"decoder_in_channels": [32, 64]}, "decoder_in_channels .* must hold encoder_hidden_dim, 32"),
        ("rt_detr", {"decoder_in_channels": [32] * 2000}, "decoder_in_channels has 2000 entries"),
        ("deimv2", {"decoder_method": "nonsense"}, "decoder_method is 'nonsense': there are default and discrete"),
        ("rf_detr", {"hidden_expansion": math.inf}, "hidden_expansion"),
        ("lw_detr", {"decoder_n_points": -3}, "decoder_n_points is -3: must not be negative"),
    ],
)
def test_value_is_named(saved, tmp_path, source, family, change, message):
    whole = json.loads((saved(family) / "config.json").read_text())
    with pytest.raises(DetectorLoadError, match=message) as caught:
        if source == "model_config":
            as_model_config(whole, change, tmp_path)
        else:
            (tmp_path / "config.json").write_text(json.dumps(whole | change))
            (tmp_path / "model.safetensors").symlink_to(saved(family) / "model.safetensors")
            load_detector(str(tmp_path))
    assert ("model_config" if source == "model_config" else str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0: must be 1 or more"),  # by its other name, d_model
        ({"unknown": 10**7}, "unknown is 10000000: must be at most 1,000,000"),
        ({"hidden_dropout": 7}, "hidden_dropout is 7: must be from 0 to 1"),
        ({"unknown": [[[[[[[[[[3]]]]]]]]]]}, "unknown has 1 entries, 9 deep: at most 1,000 and 8 deep"),
        ({"unknown": {"within": [10**7]}}, "unknown is .*must be at most"),
    ],
)
def test_fields_of_other_names_have_bounds_too(fields, message):
    with pytest.raises(DetectorLoadError, match=f"^here: {message}"):
        check_field_values(fields, DetrConfig, "here")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_authors_own_values_are_taken(family):
    """Of every family's full size, and of values at the edge of what has a meaning."""
    options = tiny_config(family).to_dict()
    edges = {"dropout": 1.0, "class_cost": 0, "num_denoising": 0, "matcher_class_cost": 0.0, "decoder_layers": 4}
    build_model(
        ModelArguments(model_config=_own(options | {name: edges[name] for name in edges if name in options})), CLASSES
    )


def _own(options):
    outside = ("id2label", "label2id", "architectures", "dtype", "transformers_version", "_name_or_path")
    backbone = {name: value for name, value in options["backbone_config"].items() if name not in outside}
    backbone.pop("stage_names", None)
    return {name: value for name, value in options.items() if name not in outside} | {"backbone_config": backbone}


def test_odd_values_of_every_field_are_taken_or_refused_in_one_line():
    """One in 401 of what scripts/walk_configurations.py tries, of each family and of image processors."""
    counts = walk(list(FAMILIES), every=401)
    ends = {end for _, end in counts}
    assert ends == {"accepted", "refused"}, counts
    assert sum(count for (_, end), count in counts.items() if end == "refused") > 25
