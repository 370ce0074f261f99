"""What the package uses of other libraries beyond their documentation: one table, and nothing outside of it.

Such a name may go with any minor version. Each is used in one file, and has a row that says what for; a row's test
fails with that sentence when the library no longer has the name, or no longer uses it as the row says.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from d3etr_hf.models.image_processors import CLASSES
from d3etr_hf.models.loading import FAMILIES

PACKAGE = Path(__file__).resolve().parents[1] / "d3etr_hf"
TRAINER = "transformers.trainer.Trainer"
CONDITIONAL_DETR = "transformers.models.conditional_detr.modeling_conditional_detr"


@dataclass(frozen=True)
class Private:
    """One name.

    Attributes:
        owner: the module or class that has it.
        name: the name; of a function's parameter its function and itself, "function(parameter)".
        file: the one file of the package that uses it.
        purpose: what for.
        parameters: that it must take, by these names.
        source: a regular expression that the owner's source must hold, where it is what the owner does with the name.
    """

    owner: str
    name: str
    file: str
    purpose: str
    parameters: tuple[str, ...] = ()
    source: str = ""

    @property
    def word(self) -> str:
        """The name as code writes it."""
        return re.sub(r".*\((\w+)\)", r"\1", self.name)

    @property
    def where(self):
        """The module or class."""
        try:
            return importlib.import_module(self.owner)
        except ModuleNotFoundError:
            module, _, name = self.owner.rpartition(".")
            return getattr(importlib.import_module(module), name, None)


EAGER = ("module", "query", "key", "value", "attention_mask", "scaling", "dropout")
TABLE = [
    Private(
        "transformers.utils.notebook",
        "NotebookProgressCallback",
        "training/notebook_table.py",
        "a notebook's table has no column a class",
    ),
    Private(
        "transformers.utils.notebook",
        "NotebookTrainingTracker",
        "training/notebook_table.py",
        "a notebook's table has no column for a validation loss",
    ),
    Private(
        "transformers.configuration_utils.PreTrainedConfig",
        "_attn_implementation_internal",
        "models/group_attention.py",
        "one module asks for the groups' attention, and no other does",
        source=r"def _attn_implementation\(self\)[^=]*\n\s+return self\._attn_implementation_internal",
    ),
    Private(
        "transformers.configuration_utils.PreTrainedConfig",
        "_attn_implementation",
        "models/group_attention.py",
        "a stock forward pass runs on what its configuration asks for",
    ),
    Private(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
        "models/loading.py",
        "any detector of Transformers teaches its predictions, and nothing else is loaded to find that out",
    ),
    Private(
        "transformers.modeling_utils",
        "ALL_ATTENTION_FUNCTIONS",
        "models/group_attention.py",
        "a stock forward pass runs on what its configuration asks for",
    ),
    Private(
        "transformers.utils.output_capturing",
        "_CAN_RECORD_REGISTRY",
        "models/sampled_memory.py",
        "a decoder whose class is another records what the stock one does",
        source=r"_CAN_RECORD_REGISTRY\.get\(self\)",
    ),
    Private(
        "transformers.modeling_utils.PreTrainedModel",
        "_can_record_outputs",
        "models/sampled_memory.py",
        "a decoder whose class is another records what the stock one does",
        source=r"_CAN_RECORD_REGISTRY\[self\] = self\._can_record_outputs",
    ),
    Private(
        "transformers.modeling_utils.PreTrainedModel",
        "_supports_flash_attn",
        "models/dense_memory.py",
        "attention that gives no maps is refused",
        source=r"if not self\._supports_flash_attn",
    ),
    Private(
        "transformers.modeling_utils.PreTrainedModel",
        "_supports_flex_attn",
        "models/dense_memory.py",
        "attention that gives no maps is refused",
        source=r"if not self\._supports_flex_attn",
    ),
    Private(
        CONDITIONAL_DETR,
        "eager_attention_forward",
        "models/conditional_detr.py",
        "a stock forward pass under eager attention",
        EAGER,
    ),
    Private(
        "transformers.models.detr.modeling_detr",
        "eager_attention_forward",
        "models/detr.py",
        "a stock forward pass under eager attention",
        EAGER,
    ),
    Private(
        CONDITIONAL_DETR,
        "encode_sinusoidal_position_embedding",
        "models/conditional_detr.py",
        "sine embeddings of reference points",
        ("num_pos_feats",),
    ),
    Private(
        "transformers.models.timm_backbone.modeling_timm_backbone.TimmBackbone",
        "_backbone",
        "models/dab_detr.py",
        "timm's ResNet is frozen as Transformers' own",
        source=r"self\._backbone = ",
    ),
    Private(CONDITIONAL_DETR, "inverse_sigmoid", "models/conditional_detr.py", "boxes are offsets of points"),
    Private(
        "transformers.models.rf_detr.modeling_rf_detr.RfDetrPreTrainedModel",
        "_init_weights",
        "models/group_detr.py",
        "how two families' sampling starts",
        ("module",),
    ),
    Private(
        "transformers.models.auto.image_processing_auto",
        "IMAGE_PROCESSOR_MAPPING_NAMES",
        "models/image_processors.py",
        "a family's own image processor",
    ),
    Private(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_BACKBONE_MAPPING_NAMES",
        "models/configuration_checks.py",
        "the list of backbones, in an error",
    ),
    Private(
        "transformers.activations",
        "ACT2FN",
        "models/field_values.py",
        "an activation that does not exist is told by its field, and not by a KeyError when the model is built",
    ),
    Private(
        "transformers.trainer_pt_utils",
        "AcceleratorConfig",
        "runs/description.py",
        "its default is left out of a run's configuration",
    ),
    Private(
        "transformers.trainer_pt_utils",
        "AcceleratorConfig",
        "training/option_checks.py",
        "what Accelerate would refuse in the middle of building the trainer is refused by its name before",
    ),
    Private(
        "transformers.training_args",
        "OptimizerNames",
        "training/option_checks.py",
        "an optimizer that does not exist is refused by its name before anything is built",
    ),
    Private(
        "transformers.integrations",
        "get_reporting_integration_callbacks",
        "training/option_trials.py",
        "a tracking package that is absent is told before the training",
    ),
    Private(
        "transformers.image_utils",
        "SizeDict",
        "data/image_sizes.py",
        "the size that an image processor resizes to",
    ),
    Private(
        "transformers.image_transforms",
        "get_size_with_aspect_ratio",
        "data/transforms.py",
        "crops are drawn in the sizes that the image processor would give images, and RF-DETR's gives these",
        ("image_size", "size", "max_size"),
    ),
    Private(
        "accelerate.Accelerator",
        "_is_accelerate_prepared",
        "training/trainer.py",
        "a model that was evaluated first is wrapped when it is trained",
        source=r'if getattr\(model, "_is_accelerate_prepared", False\)',
    ),
    Private(
        TRAINER,
        "_get_grad_norm",
        "training/trainer.py",
        "the gradient's norm, before the optimizer's step",
        ("model", "grad_norm"),
        r"grad_norm = self\._get_grad_norm\(model, grad_norm=grad_norm\)",
    ),
    Private(
        TRAINER,
        "_get_num_items_in_batch",
        "training/trainer.py",
        "Trainer asks it for what the whole step's sums are divided by",
        ("batch_samples", "device"),
        r"num_items_in_batch = self\._get_num_items_in_batch\(batch_samples, device\)",
    ),
    Private(
        TRAINER,
        "_get_train_sampler",
        "training/trainer.py",
        "what is drawn for an image is known from seed, epoch and image alone",
        ("train_dataset",),
        r"sampler_fn=self\._get_train_sampler",
    ),
    Private(
        TRAINER,
        "_created_lr_scheduler",
        "training/trainer.py",
        "a second training gets a schedule of its own",
        source=r"if self\._created_lr_scheduler:\n\s+self\.lr_scheduler = None",
    ),
    Private(
        TRAINER,
        "_save_checkpoint",
        "training/resumable_trainer.py",
        "Trainer calls it at every save, and the query adapter is saved beside",
        ("model", "trial"),
        r"self\._save_checkpoint\(model, trial\)",
    ),
    Private(
        TRAINER,
        "_run_epoch",
        "training/resumable_trainer.py",
        "a run that has taken its last step takes no other when it goes on",
        source=r"self\._run_epoch\(\n\s+model=model,",
    ),
    Private(
        TRAINER,
        "_finalize_training",
        "training/resumable_trainer.py",
        "a training that is asked to stop keeps the checkpoint that it goes on from",
        source=r"return self\._finalize_training\(trial, ",
    ),
    Private(
        TRAINER,
        "_train_batch_size",
        "training/trainer.py",
        "the size of batches that auto_find_batch_size has found",
        source=r"self\._train_batch_size = ",
    ),
    Private(
        "accelerate.utils.memory",
        "should_reduce_batch_size",
        "training/memory.py",
        "which errors auto_find_batch_size takes for a batch that does not fit",
        ("exception",),
    ),
    Private(
        TRAINER,
        "_load_from_checkpoint",
        "training/resumable_trainer.py",
        "Trainer calls it to resume, and names are converted",
        ("resume_from_checkpoint", "model"),
        r"self\._load_from_checkpoint\(resume_from_checkpoint",
    ),
    Private(
        TRAINER,
        "_load_best_model",
        "training/resumable_trainer.py",
        "Trainer calls it at the end, and names are converted",
        source=r"self\._load_best_model\(\)",
    ),
    Private(
        TRAINER,
        "_get_output_dir",
        "training/resumable_trainer.py",
        "the folder in which Trainer makes the checkpoint",
        ("trial",),
        r"run_dir = self\._get_output_dir\(",
    ),
    Private(TRAINER, "_prepare_inputs", "training/trainer.py", "a batch is moved to the device", ("inputs",)),
    Private(
        TRAINER,
        "save_model(_internal_call)",
        "publishing/hub_trainer.py",
        "the model is saved without being pushed",
        source=r"if self\.args\.push_to_hub and not _internal_call",
    ),
    Private(
        TRAINER,
        "_finish_current_push",
        "publishing/hub_trainer.py",
        "a push in the background ends before the last one begins",
    ),
    Private(
        TRAINER,
        "_push_from_checkpoint",
        "publishing/hub_trainer.py",
        "Trainer calls it at every save, and safe files alone are pushed",
        ("checkpoint_folder",),
        r"self\._push_from_checkpoint\(output_dir\)",
    ),
    Private(
        "evaluate.EvaluationModule",
        "_info",
        "evaluation/coco_metric.py",
        "a metric says what it takes",
        source=r"self\._info\(",
    ),
    Private(
        "evaluate.EvaluationModule",
        "_compute",
        "evaluation/coco_metric.py",
        "a metric's own computation",
        source=r"self\._compute\(",
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.owner.rpartition('.')[2]}.{row.name}")
def test_the_library_still_has_it(row):
    complaint = f"{row.owner} no longer has {row.name} as d3etr_hf/{row.file} uses it: {row.purpose}"
    owner = row.where
    assert owner is not None, complaint
    function, _, parameter = row.name.partition("(")
    parameters = (*row.parameters, parameter.rstrip(")")) if parameter else row.parameters
    # what is set in a method only is known from the source below
    if parameters or not row.source:
        assert hasattr(owner, function), complaint
    if parameters:
        assert set(parameters) <= inspect.signature(getattr(owner, function)).parameters.keys(), complaint
    if row.source:
        assert re.search(row.source, inspect.getsource(owner)), complaint


def test_what_the_tables_of_transformers_hold():
    """A mapping that is still there may hold something else."""
    from transformers.activations import ACT2FN
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    assert all("pil" in IMAGE_PROCESSOR_MAPPING_NAMES[family] for family in FAMILIES.keys() - CLASSES.keys())
    assert {"resnet", "convnext", "swin"} <= set(MODEL_FOR_BACKBONE_MAPPING_NAMES)
    assert {"relu", "gelu"} <= set(ACT2FN) and "rely" not in ACT2FN
    default = object()
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", default) is default
    assert callable(ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", default))


# what the package uses

# documented, though it begins with an underscore
DOCUMENTED = {"_replace"}
# modules whose names are public where they stand; what else is public is found in `transformers` itself
PUBLIC_MODULES = {
    "transformers",
    "transformers.utils",
    "transformers.trainer_utils",
    "accelerate",
    "accelerate.utils",
    "huggingface_hub",
    "huggingface_hub.errors",
}
# where a family's own stock model and loss stand
OF_A_FAMILY = ("transformers.models.", "transformers.loss.")


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


@cache
def trees() -> dict[str, ast.Module]:
    """Every file of the package, by its path within it."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def assigned(node: ast.AST) -> list[ast.expr]:
    """What an assignment sets, one by one."""
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def names_of_class(body: ast.ClassDef) -> set[str]:
    """Private names that a class gives itself: methods, attributes, what its methods set on `self`."""
    found = {node.name for node in ast.walk(body) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(body):
        for target in assigned(node):
            if isinstance(target, ast.Name):
                found.add(target.id)
            elif (
                isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
            ):
                found.add(target.attr)
    return {name for name in found if is_private(name)}


@cache
def classes() -> dict[tuple[str, str], type]:
    """Every class of the package, by its file and name."""
    found = {}
    for file, tree in trees().items():
        name = "d3etr_hf." + file.removesuffix(".py").replace("/", ".").removesuffix("__init__")
        module = importlib.import_module(name.rstrip("."))
        found |= {
            (file, body.name): getattr(module, body.name) for body in tree.body if isinstance(body, ast.ClassDef)
        }
    return found


def of_foreign_bases(file: str, body: ast.ClassDef) -> set[str]:
    """Those of a class's private names that a base from elsewhere has, or sets on itself; or a base of a subclass."""
    found, own = set(), classes()[file, body.name]
    bases = {base for each in classes().values() if issubclass(each, own) for base in each.__mro__}
    for base in bases - set(classes().values()):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            source = ""
        found |= {
            name for name in names_of_class(body) if hasattr(base, name) or re.search(rf"\bself\.{name}\b", source)
        }
    return found


@cache
def foreign_names() -> dict[str, set[str]]:
    """Private names of other libraries, by the files that use them."""
    own, foreign = set(), set()
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
            own |= {target.id for target in assigned(node) if isinstance(target, ast.Name)}
        for body in tree.body:
            if isinstance(body, ast.ClassDef):
                own |= names_of_class(body)
                foreign |= of_foreign_bases(file, body)
    found: dict[str, set[str]] = {}
    for file, tree in trees().items():
        for name in filter(is_private, private_uses(tree)):
            if (name not in own or name in foreign) and name not in DOCUMENTED:
                found.setdefault(name, set()).add(file)
    return found


def private_uses(tree: ast.Module) -> Iterator[str | None]:
    """Attributes, keywords, and what classes define, as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword):
            yield node.arg
        elif isinstance(node, ast.ClassDef):
            yield from names_of_class(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr"):
            if isinstance(node.args[1], ast.Constant):
                yield node.args[1].value


def undocumented_imports() -> Iterator[tuple[str, str]]:
    """Files and what they import of the libraries beyond their public modules."""
    import transformers

    for file, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in (
                "accelerate",
                "huggingface_hub",
                "transformers",
            ):
                continue
            for name in node.names:
                if node.module in PUBLIC_MODULES or hasattr(transformers, name.name):
                    continue
                if not (
                    file in family_files() and node.module.startswith(OF_A_FAMILY) and not in_table(file, name.name)
                ):
                    yield file, name.name


def family_files() -> set[str]:
    """The files of the families: each is built on its stock model's own parts, which its parity tests watch."""
    return {family.__module__.removeprefix("d3etr_hf.").replace(".", "/") + ".py" for family in FAMILIES.values()}


def in_table(file: str, name: str) -> bool:
    return any(row.word == name and row.file == file for row in TABLE)


def test_every_private_name_is_in_the_table():
    """And is used in the file of its row alone."""
    listed: dict[str, set[str]] = {}
    for row in TABLE:
        listed.setdefault(row.word, set()).add(row.file)
    used = {name: set(files) for name, files in foreign_names().items()}
    # how its stock class starts its modules is a family's to ask
    used["_init_weights"] = used.get("_init_weights", set()) - family_files()
    used = {name: files for name, files in used.items() if files}
    for file, name in undocumented_imports():
        used.setdefault(name, set()).add(file)
    wrong = {name: (used.get(name), listed.get(name)) for name in used.keys() | listed.keys()}
    wrong = {name: files for name, (files, rows) in wrong.items() if files != rows}
    assert not wrong, f"used in these files, and not as the table says: {wrong}"


def test_the_scan_sees_what_it_should():
    tree = ast.parse(
        "class A:\n    _a = 1\n    def _b(self):\n        self._c, x = y._d, f(_e=1)\n        getattr(y, '_f')"
    )
    found = set(filter(is_private, private_uses(tree)))
    assert found == {"_a", "_b", "_c", "_d", "_e", "_f"} and names_of_class(tree.body[0]) == {"_a", "_b", "_c"}
    assert not any(map(is_private, (None, "__init__", "_", "name")))
