"""What loading and building refuse, by name, and that pretrained weights arrive unchanged."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ConditionalDetrForSegmentation,
    ConditionalDetrModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    YolosConfig,
)

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.models.loading import (
    FAMILIES,
    ModelArguments,
    TeacherArguments,
    build_model,
    load_detector,
    model_type_of,
)
from tests.tiny import tiny_config, tiny_model

CLASSES = ["circle", "rectangle", "triangle"]
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
}


def model_options(**backbone) -> dict:
    """`model_config` of a small detector over a ResNet."""
    resnet = {"model_type": "resnet", "out_features": ["stage2"], **TINY_RESNET}
    return {**SMALL, "backbone_config": resnet | backbone}


def build(options: dict | str, backbone_weights=None, classes: list[str] = CLASSES):
    weights = None if backbone_weights is None else str(backbone_weights)
    return build_model(ModelArguments(model_config=options, backbone_weights=weights), classes)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights and batch norm statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a detector as `save_pretrained` leaves it."""
    tiny_model().save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


@pytest.fixture
def classifier(tmp_path):
    """A folder with a pretrained ResNet as it comes from the Hub: with a classification head."""
    randomise(ResNetForImageClassification(ResNetConfig(**TINY_RESNET))).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# detectors


def test_detector_is_loaded_whole_and_in_float32(checkpoint):
    """HF_NOTES 8: `from_pretrained` would keep float16."""
    expected = tiny_model()
    half = checkpoint.parent / "half"
    expected.to_stock().half().save_pretrained(half)
    for folder in (checkpoint, half):
        loaded = load_detector(str(folder))
        assert not loaded.training
        for name, value in loaded.state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected.state_dict()[name], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(load_detector(str(checkpoint)).state_dict(), expected.state_dict(), atol=0, rtol=0)


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a demonstration was run there is a runs/demo/teacher
    with pytest.raises(DetectorLoadError, match=f"teacher '{tmp_path}': the folder holds no config.json: name one"):
        load_detector(str(tmp_path), "teacher")
    for path in (str(tmp_path / "absent"), "./absent", "runs/demo/teacher"):
        with pytest.raises(DetectorLoadError, match=f"teacher '{path}': there is no such folder"):
            load_detector(path, "teacher")


@pytest.mark.parametrize("content", ["{nope", '{"model_type": "conditional_detr", "d_model": "wide"}'])
def test_unreadable_config(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(DetectorLoadError, match="no model configuration could be read"):
        load_detector(str(checkpoint))


def test_each_family_loads_as_its_own_class(tmp_path):
    for model_type, family in FAMILIES.items():
        model = tiny_model(model_type=model_type)
        model.save_pretrained(tmp_path / model_type)
        loaded = load_detector(str(tmp_path / model_type))
        assert type(loaded) is family
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_another_family(tmp_path):
    config = YolosConfig()
    config.architectures = ["YolosForObjectDetection"]
    config.save_pretrained(tmp_path)
    with pytest.raises(DetectorLoadError, match="is a 'yolos' model; the families.* are conditional_detr, "):
        load_detector(str(tmp_path))
    with pytest.raises(DetectorLoadError, match="(?s)^model_config is a 'yolos' model; the families"):
        build(model_options() | {"model_type": "yolos"})


@pytest.mark.parametrize("model_class", [ConditionalDetrModel, ConditionalDetrForSegmentation])
def test_conditional_detr_that_is_no_detector(tmp_path, model_class):
    """Of a segmentation model and of a bare one all or some detection tensors would start at random."""
    config = tiny_config(
        encoder_attention_heads=8,
        backbone_config=ConvNextConfig(
            hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
    )
    model_class(config).save_pretrained(tmp_path)
    with pytest.raises(DetectorLoadError, match=f"is no detector: its architectures are .*{model_class.__name__}"):
        load_detector(str(tmp_path))


def test_missing_tensors_are_named(checkpoint):
    """Transformers only warns, and the tensor starts at random."""
    weights = load_file(checkpoint / "model.safetensors")
    del weights["bbox_predictor.layers.1.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(DetectorLoadError, match=r"1 tensors are missing.*bbox_predictor\.layers\.1\.weight"):
        load_detector(str(checkpoint))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut off", "could not be read: model.safetensors is damaged"),
        ("not safetensors", "could not be read: model.safetensors is damaged"),
        ("a named pipe", "could not be read: there is no model.safetensors"),
        ("gone", "could not be read: there is no model.safetensors"),
        ("of another size", r"1 tensors are of another shape .*\[7, 32\] for \[9, 32\]"),
    ],
)
def test_damaged_weights(checkpoint, damage, message):
    file = checkpoint / "model.safetensors"
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "not safetensors":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    elif damage == "of another size":
        edit_config(checkpoint, num_queries=9)
    else:
        file.unlink()
    if damage == "a named pipe":
        os.mkfifo(file)
    with pytest.raises(DetectorLoadError, match=f"'{checkpoint}': .*{message}"):
        load_detector(str(checkpoint))


@pytest.mark.parametrize(
    "backbone",
    [
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50d", "out_indices": [1, 2, 3, 4]}},
        {"backbone_config": None, "backbone": "resnet50d", "use_timm_backbone": True, "use_pretrained_backbone": True},
    ],
    ids=["new layout", "old layout"],
)
def test_timm_backbone_without_timm_says_what_to_install(checkpoint, backbone, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    edit_config(checkpoint, **backbone)
    with pytest.raises(DetectorLoadError, match=r"teacher .*timm backbone \('resnet50d': .*pip install timm"):
        load_detector(str(checkpoint), "teacher")


# arguments


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ModelArguments(), "either 'model' .* or 'model_config'"),
        (lambda: ModelArguments(model="a", model_config="b"), "either 'model' .* or 'model_config'"),
        (lambda: ModelArguments(model="a", backbone_weights="b"), "'backbone_weights' is for a new model"),
        (lambda: ModelArguments(model_config="b", new_head=True), "'new_head' is for a 'model' to go on from"),
        (lambda: TeacherArguments(teacher="a", inherit_from_teacher=["neck"]), "neck.*'encoder', 'decoder'"),
        (lambda: TeacherArguments(inherit_from_teacher=["encoder"]), "needs a 'teacher'"),
    ],
)
def test_arguments_that_contradict_each_other(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# new models


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_querys": 7}, r"has no \['num_querys'\]; did you mean 'num_queries' for 'num_querys'\?"),
        ({"d_model": "wide"}, "'d_model' expected int"),
        ({"d_model": 30}, "d_model 30 must be a multiple of encoder_attention_heads, which is 4"),
        ({"d_model": 30, "encoder_attention_heads": 5}, "multiple of decoder_attention_heads, which is 4"),
        ({"d_model": 30, "encoder_attention_heads": 5, "decoder_attention_heads": 5}, "d_model 30 .* multiple of 4"),
        ({"activation_function": "rely"}, "'rely'"),
        ({"num_queries": -1}, "-1"),
        ({"id2label": {0: "a"}}, r"holds \['id2label'\]: leave them out"),
        ({"backbone_config": None}, "backbone_config is None; it must say which"),
        ({"backbone_config": {"model_type": "bert"}}, "'bert'.*must say which backbone.* resnet"),
        ({"backbone_config": {"model_type": "resnet", "width": 3}}, r"ResNetConfig has no \['width'\]"),
        ({"backbone_config": {"model_type": "resnet", "layer_type": "thick"}}, "layer_type=thick"),
        ({"backbone_config": {"model_type": "resnet", "out_features": ["stage9"]}}, "stage9"),
    ],
)
def test_model_config_is_checked(changes, message):
    """Transformers keeps an unknown key in silence and takes timm's ResNet-50 where no backbone is given."""
    with pytest.raises(DetectorLoadError, match=f"(?s)^model_config.*{message}"):
        build(model_options() | changes)


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot be read"), ("- a", r"holds \['a'\]"), ("a: [", "not valid YAML"), ("", "holds None")],
)
def test_model_config_file_is_checked(tmp_path, content, message):
    file = tmp_path / "model.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DetectorLoadError, match=f"(?s)^model_config '{file}'.*{message}"):
        build(str(file))


def test_model_config_file_and_mapping_give_the_same_model(tmp_path):
    """`1e-2` is a number in these files, as in all others; plain YAML 1.1 takes it for text."""
    options = model_options() | {"init_std": 1e-2}
    as_json, as_yaml = tmp_path / "model.json", tmp_path / "model.yaml"
    as_json.write_text(json.dumps(options))
    as_yaml.write_text(json.dumps(options).replace('"init_std": 0.01', '"init_std": 1e-2'))
    assert "1e-2" in as_yaml.read_text()
    configs = [build(source).config.to_dict() for source in (options, str(as_json), str(as_yaml))]
    assert configs[0] == configs[1] == configs[2] and configs[0]["init_std"] == 1e-2
    assert configs[0]["id2label"] == dict(enumerate(CLASSES))
    assert configs[0]["label2id"] == {"circle": 0, "rectangle": 1, "triangle": 2}


def test_timm_model_config_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DetectorLoadError, match=r"model_config has a timm backbone.*pip install timm"):
        build({**SMALL, "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}})


# models to go on from


def test_model_of_the_same_classes_is_taken_as_it_is(checkpoint):
    model = build_model(ModelArguments(model=str(checkpoint)), CLASSES)
    torch.testing.assert_close(model.state_dict(), tiny_model().state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    "classes, message",
    [
        (
            ["circle", "triangle", "rectangle"],
            "class 1, 'rectangle' in the model and 'triangle' in the data.*--new_head true",
        ),
        (["circle", "rectangle"], "3 classes, the data set 2; .* class 2, 'triangle' in the model and None"),
    ],
)
def test_model_of_other_classes_is_refused(checkpoint, classes, message):
    with pytest.raises(DetectorLoadError, match=message):
        build_model(ModelArguments(model=str(checkpoint)), classes)


def test_classes_are_compared_by_number_not_by_place_in_the_file(checkpoint):
    edit_config(checkpoint, id2label={"2": "triangle", "0": "circle", "1": "rectangle"})
    assert build_model(ModelArguments(model=str(checkpoint)), CLASSES).config.id2label[2] == "triangle"


# backbone weights


def test_resnet_weights_arrive_exactly_with_their_batch_norm_statistics(classifier):
    """Weights, statistics and the features that follow from them, against Transformers' own backbone."""
    backbone = build(model_options(), classifier).model.backbone.model
    expected = ResNetBackbone.from_pretrained(classifier, out_features=["stage2"])
    own, theirs = backbone.state_dict(), expected.state_dict()
    assert {name for name in theirs if not name.endswith("num_batches_tracked")} == set(own)
    for name, value in own.items():
        assert torch.equal(value, theirs[name]), name
    file = load_file(classifier / "model.safetensors")
    statistics = [name for name in own if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 16  # the stem, three layers of two, and one shortcut have a mean and a variance each
    for name in statistics:
        assert torch.equal(own[name], file[f"resnet.{name}"]), name
    pixels = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        features, wanted = backbone.eval()(pixels).feature_maps[0], expected.eval()(pixels).feature_maps[0]
    assert (features - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_trains_is_the_same_with_backbone_weights(classifier):
    """Transformers' own loading would set the frozen stem free (HF_NOTES 2)."""
    loaded, fresh = build(model_options(), classifier), build(model_options())
    trains = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (loaded, fresh)]
    assert trains[0] == trains[1]
    assert not any(".backbone.model.embedder." in name for name in trains[0])
    assert loaded.training == fresh.training


def test_random_resnet_is_warned_about_once(classifier, caplog):
    build(model_options(), classifier)
    assert "backbone_weights" not in caplog.text
    build(model_options())
    assert caplog.text.count("a new ResNet backbone without backbone_weights") == 1


def test_convnext_weights_arrive(tmp_path):
    """A classifier lacks the norm of the stage that a backbone gives out; it starts as the identity."""
    sizes = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
    classifier = randomise(ConvNextForImageClassification(ConvNextConfig(**sizes)))
    classifier.save_pretrained(tmp_path)
    backbone = {"model_type": "convnext", "out_features": ["stage2"], **sizes}
    own = build({**SMALL, "backbone_config": backbone}, tmp_path).model.backbone.model.state_dict()
    for name, value in classifier.convnext.state_dict().items():
        if not name.startswith("layernorm."):
            assert torch.equal(own[name], value), name
    assert torch.all(own["hidden_states_norms.stage2.weight"] == 1)


@pytest.mark.parametrize(
    "backbone, message",
    [
        (
            {"depths": [1, 1]},
            r"do not fit.*depths \(\[1, 1\] here, \[1, 2\] there\)",
        ),  # deeper weights: a part would fit
        ({"depths": [1, 3]}, r"do not fit.*depths \(\[1, 3\] here, \[1, 2\] there\)"),
        ({"hidden_sizes": [8, 24]}, "do not fit.*hidden_sizes"),
        ({"layer_type": "bottleneck"}, r"do not fit.*layer_type \('bottleneck' here, 'basic' there\)"),
        ({"hidden_act": "gelu"}, r"computes something else.*hidden_act \('gelu' here, 'relu' there\)"),
    ],
)
def test_weights_of_another_architecture_are_refused(classifier, backbone, message):
    with pytest.raises(DetectorLoadError, match=f"backbone_weights '{classifier}' .*{message}"):
        build(model_options(**backbone), classifier)


def test_weights_whose_strides_lie_elsewhere_are_refused(tmp_path):
    """`downsample_in_bottleneck` changes no shape: ResNet v1 against v1.5."""
    sizes = TINY_RESNET | {"layer_type": "bottleneck", "hidden_sizes": [16, 32]}
    randomise(ResNetBackbone(ResNetConfig(**sizes))).save_pretrained(tmp_path)
    build(model_options(**sizes), tmp_path)
    with pytest.raises(DetectorLoadError, match="computes something else.*downsample_in_bottleneck"):
        build(model_options(**sizes, downsample_in_bottleneck=True), tmp_path)


def test_weights_of_another_type_or_none_are_refused(tmp_path, checkpoint, classifier):
    with pytest.raises(DetectorLoadError, match="are of a 'conditional_detr' model.* 'resnet' backbone"):
        build(model_options(), checkpoint)
    with pytest.raises(DetectorLoadError, match=f"backbone_weights '{tmp_path / 'absent'}' cannot be read"):
        build(model_options(), tmp_path / "absent")
    weights = load_file(classifier / "model.safetensors")
    lost = "resnet.embedder.embedder.normalization.running_mean"
    save_file({k: v for k, v in weights.items() if k != lost}, classifier / "model.safetensors", {"format": "pt"})
    with pytest.raises(DetectorLoadError, match=r"1 tensors are missing.*embedder\.normalization\.running_mean"):
        build(model_options(), classifier)
    save_file(weights | {lost: weights[lost] / 0}, classifier / "model.safetensors", {"format": "pt"})
    with pytest.raises(DetectorLoadError, match=r"not finite, .*embedder\.normalization\.running_mean"):
        build(model_options(), classifier)
    (classifier / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DetectorLoadError, match=f"backbone_weights '{classifier}': .*model.safetensors is damaged"):
        build(model_options(), classifier)
    (classifier / "model.safetensors").rename(classifier / "pytorch_model.bin")
    with pytest.raises(DetectorLoadError, match=f"backbone_weights '{classifier}': its weights are a pickle"):
        build(model_options(), classifier)


@pytest.mark.parametrize("options", [{"model_type": "nonsense"}, {"model_type": "resnet"}, {"model_type": 3}])
def test_an_unknown_family_is_named_before_anything_is_read(options):
    """Data and image processor are looked for by the family."""
    with pytest.raises(DetectorLoadError, match="the families that can be students and teachers are"):
        model_type_of(ModelArguments(model_config=options))
