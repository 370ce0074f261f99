"""Every file in configs/ is one that the scripts, or accelerate, can use as it stands."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import CONFIG_MAPPING

from d3etr_hf.cli import compare
from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import read_yaml
from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.image_processors import RfDetrImageProcessorPil
from d3etr_hf.models.loading import (
    DEFAULT_FAMILY,
    FAMILIES,
    ModelArguments,
    TeacherArguments,
    check_model_options,
)
from d3etr_hf.runs.comparison import Comparison
from d3etr_hf.runs.planned_run import plan
from d3etr_hf.training import unlabeled
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))
MODELS = sorted(CONFIGS.rglob("*model.yaml"))
COMPARISONS = sorted(path for name in ("families", "evidence") for path in (CONFIGS / name).glob("*.yaml"))
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - set(ACCELERATE) - set(MODELS) - set(COMPARISONS))
TYPES = {
    "scripts/train.py": (ModelArguments, DataArguments, D3etrTrainingArguments),
    "scripts/distill.py": (ModelArguments, TeacherArguments, DataArguments, D3etrTrainingArguments),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def script_of(recipe: Path) -> str:
    """The script that the recipe's own header names."""
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    named = [script for script in TYPES if any(script in line for line in header)]
    assert named, f"{recipe}: the header names no script"
    # r50_r18_12.yaml also says how to train the student alone
    return "scripts/distill.py" if "scripts/distill.py" in named else named[0]


def parse(recipe: Path) -> dict:
    """The dataclasses that a recipe makes, by type."""
    types = TYPES[script_of(recipe)]
    return dict(zip(types, parse_arguments(types, [str(recipe)]), strict=True))


def build_on_meta(path: Path, classes: int = 80) -> Detector:
    options = read_yaml(path.read_text())
    check_model_options(options, str(path))
    with torch.device("meta"):
        model_type = options.pop("model_type", DEFAULT_FAMILY)
        return FAMILIES[model_type](CONFIG_MAPPING[model_type](**options, num_labels=classes))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Paths in recipes count from the repository."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_is_understood_by_its_script(recipe):
    """An unknown key, a value of the wrong type or out of range, a model file that is not there."""
    parsed = parse(recipe)
    model, training = parsed[ModelArguments], parsed[D3etrTrainingArguments]
    assert model.model_config is None or Path(model.model_config) in {path.relative_to(REPOSITORY) for path in MODELS}
    assert not training.fp16 and not training.bf16  # precision belongs to configs/accelerate
    if script_of(recipe) == "scripts/distill.py":
        assert training.distillation.needs_teacher == (parsed[TeacherArguments].teacher is not None)


@pytest.mark.parametrize("path", COMPARISONS, ids=name_of)
def test_comparison_is_understood(path, monkeypatch):
    """Every option of every run, by the parser of the command that takes it; data sets are made later."""
    monkeypatch.setattr(compare, "check_places", lambda arguments: None)
    monkeypatch.setattr(unlabeled, "require_place", lambda folder, option: None)
    (comparison,) = parse_arguments([Comparison], [str(path)])
    runs = plan(comparison)
    compare.check_runs(runs, path.name)
    assert len({run.folder for run in runs}) == len(runs)


def test_decoders_that_are_compared_differ_in_depth_alone():
    """The deepest is the teacher that comes with the package."""
    (comparison,) = parse_arguments([Comparison], [str(CONFIGS / "evidence" / "decoder_layers.yaml")])
    teacher = read_yaml((CONFIGS / "demo" / "teacher_model.yaml").read_text())
    models = [comparison.entry(name).student["model_config"] for name in comparison.entries]
    assert models == [teacher | {"decoder_layers": count} for count in range(1, 7)]
    steps = {mode: comparison.mode(mode)["max_steps"] for mode in comparison.modes}
    assert steps == {"short": 1000, "long": 4000}


def test_no_two_recipes_share_an_output_folder():
    """The second would be refused, or go on from the first."""
    folders = [parse(recipe)[D3etrTrainingArguments].output_dir for recipe in RECIPES]
    assert len(folders) == len(set(folders))


COCO = [path for path in RECIPES if path.parent.name == "coco"]
# of the other families, a public pair each: their teachers, and how large images are, or None for what is saved
PAIRS = {
    "dab_r50_r18": ("IDEA-Research/dab-detr-resnet-50", 800),
    "deformable_r50_r18": ("SenseTime/deformable-detr", 800),
    "detr_r101_r50": ("facebook/detr-resnet-101", 800),
    "dfine_xlarge_nano": ("ustc-community/dfine-xlarge-coco", 640),
    "rf_detr_large_nano": ("Roboflow/rf-detr-large", None),
    "rtdetr_r101_r18": ("PekingU/rtdetr_r101vd", 640),
}


@pytest.mark.parametrize("recipe", [path for path in COCO if path.stem in PAIRS], ids=name_of)
def test_coco_pair_of_a_family(recipe):
    """A public teacher, the family's own size of images, and a student that is published or whose files are here."""
    parsed, (teacher, size) = parse(recipe), PAIRS[recipe.stem]
    data, model = parsed[DataArguments], parsed[ModelArguments]
    assert parsed[TeacherArguments].teacher == teacher
    assert size == (data.short_side or data.image_size) and (data.long_side == 1333) == (size == 800)
    assert f"scripts/distill.py configs/coco/{recipe.name}" in recipe.read_text()
    assert (model.model or model.backbone_weights).count("/") == 1
    assert model.model_config is None or (REPOSITORY / model.model_config).exists()


def test_a_teacher_of_larger_squares_keeps_its_size(tmp_path):
    """`image_size` in this recipe would be the teacher's, too."""
    data = parse(CONFIGS / "coco" / "rf_detr_large_nano.yaml")[DataArguments]
    folder = make_shapes(tmp_path / "shapes", 1, 1, image_size=64, progress=False)
    student, teacher = (RfDetrImageProcessorPil(size={"height": side, "width": side}) for side in (384, 704))
    train, val = load_splits(replace(data, data_folder=str(folder)), student, teacher)
    assert train[0]["teacher_pixel_values"].shape == (3, 704, 704)
    assert val[0]["pixel_values"].shape == (3, 384, 384) == train[0]["pixel_values"].shape
    smaller = replace(data, data_folder=str(folder), image_size=384)
    assert "teacher_pixel_values" not in load_splits(smaller, student, teacher)[0][0]


def test_every_pair_is_there():
    assert {path.stem for path in COCO} >= PAIRS.keys()


@pytest.mark.parametrize("recipe", [path for path in COCO if path.stem not in PAIRS], ids=name_of)
def test_coco_recipe_is_that_of_conditional_detr(recipe):
    """Conditional DETR's own recipe; 8 GPUs as in configs/accelerate/eight_gpus.yaml."""
    parsed = parse(recipe)
    data, training, model = parsed[DataArguments], parsed[D3etrTrainingArguments], parsed[ModelArguments]
    eight_gpus = load_config_from_file(str(CONFIGS / "accelerate" / "eight_gpus.yaml"))
    assert f"scripts/{Path(script_of(recipe)).name} configs/coco/{recipe.name}" in recipe.read_text()
    assert training.per_device_train_batch_size * eight_gpus.num_processes == 16
    assert (training.learning_rate, training.backbone_learning_rate) == (1e-4, 1e-5)
    assert (training.weight_decay, training.max_grad_norm) == (1e-4, 0.1)
    assert (data.short_side, data.long_side, data.augmentation) == (800, 1333, "paper")
    # the rate falls after epoch 40 of 50, or 11 of 12: for COCO's 117 266 images with boxes, and for all 118 287
    for steps_per_epoch in (7330, 7393):
        drop = round(training.learning_rate_drop * training.num_train_epochs * steps_per_epoch)
        assert drop == {50: 40, 12: 11}[training.num_train_epochs] * steps_per_epoch
    # the backbone's weights are of the depth that the model file says
    depth = {"r18_model": "18", "r50_model": "50", "r101_model": "101"}[Path(model.model_config).stem]
    assert model.backbone_weights == f"microsoft/resnet-{depth}"


def test_coco_runs_that_are_compared_differ_in_what_they_compare():
    """Distilled, teacherless, inherited and alone share data, model and schedule."""

    def values(name):
        return read_yaml((CONFIGS / "coco" / f"{name}.yaml").read_text())

    alone = values("r50_student_12")
    for name in ("r101_r50_12", "r101_r50_12_teacherless", "r101_r50_12_inherit"):
        other = values(name)
        changed = {key for key in alone.keys() | other.keys() if alone.get(key) != other.get(key)}
        assert changed - {"output_dir"} <= {
            "teacher",
            "inherit_from_teacher",
            "auxiliary_queries",
            "adaptive_matching",
        }
        assert changed - {"output_dir"}, name


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_model_is_built(path):
    assert sum(parameter.numel() for parameter in build_on_meta(path).parameters()) > 100_000


def test_coco_models_have_the_published_sizes():
    """Conditional DETR's authors: 44 M (R50-C5) and 63 M (R101-C5) parameters, with 91 classes."""
    models = {name: build_on_meta(CONFIGS / "coco" / f"{name}_model.yaml", 91) for name in ("r18", "r50", "r101")}
    millions = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    assert round(millions["r50"]) in (43, 44) and round(millions["r101"]) in (62, 63)
    # Torchvision's ResNets without their classifiers and without the weights and biases of batch norm, which are
    # fixed here: 25.557 - 2.049 - 0.053 M, 44.549 - 2.049 - 0.105 M and 11.690 - 0.513 - 0.010 M
    backbones = {
        name: sum(p.numel() for p in model.model.backbone.parameters()) / 1e6 for name, model in models.items()
    }
    assert backbones == pytest.approx({"r18": 11.167, "r50": 23.455, "r101": 42.395}, abs=2e-3)


def test_students_can_inherit_from_the_coco_teachers():
    """R101, R50 and R18 share the shapes of encoder, decoder and heads; only R18's projection is its own."""

    def shapes(name):
        model = build_on_meta(CONFIGS / "coco" / f"{name}_model.yaml")
        return {key: tuple(value.shape) for key, value in model.state_dict().items() if ".backbone." not in key}

    r18, r50, r101 = shapes("r18"), shapes("r50"), shapes("r101")
    assert r101 == r50
    assert {key for key, shape in r18.items() if r50[key] != shape} == {"model.input_projection.weight"}


@pytest.mark.parametrize("path", ACCELERATE, ids=name_of)
def test_accelerate_reads_its_configurations(path):
    """YAML 1.1 would take a bare `NO` or `no` for false."""
    configuration = load_config_from_file(str(path))
    assert configuration.distributed_type in ("NO", "MULTI_GPU")
    assert configuration.mixed_precision == (path.stem if path.stem in ("fp16", "bf16") else "no")
    assert (configuration.distributed_type == "NO") == (configuration.num_processes == 1)
    assert configuration.num_processes % configuration.num_machines == 0
