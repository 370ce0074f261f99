"""The contract of every detector family: what a student and a teacher can be asked, whatever model they are.

A family is one file: a class that inherits `Detector` and the stock class of Transformers, and fills in what is
abstract here (CONTRIBUTING.md, "Add a family"). Nothing outside `models/` knows more of a detector than this.
"""

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.losses import DetectionCriterion
from d3etr_hf.losses.grids import compared_levels
from d3etr_hf.models.memory_adapters import VIDT, ComparesMemory
from d3etr_hf.models.timm_names import copy_dilation
from d3etr_hf.outputs import (
    OWN,
    ComparedLevel,
    DecodedInstances,
    DetectorOutput,
    GroupRequest,
    MemoryLevel,
    Queries,
    Scores,
    SelectedScores,
)

logger = logging.get_logger(__name__)

ADAPTERS = "query_adapters"
BACKBONE, ENCODER, DECODER, HEADS, QUERIES = ROLES = ("backbone", "encoder", "decoder", "heads", "queries")


if TYPE_CHECKING:
    StockModel = PreTrainedModel  # whose attributes every family has, from its stock class
else:
    StockModel = ABC


class Detector(StockModel):
    """A DETR of Transformers with further query groups and attention maps on demand.

    Computes what the stock class computes unless a `request` is passed; saves a plain stock checkpoint. A model built
    from a configuration starts as its authors start it; built or loaded, what trains is what they train. Checkpoints
    load in float32 unless `dtype` is given.

    Attributes:
        stock_class: the class of Transformers that the saved model is of.
        title: what people call the family.
        tag: the family's tag on the Hub.
        parts: for each of `ROLES` the prefixes of its parameters' names.
        layer_modules: prefixes of module lists with one entry a decoder layer.
        reads_padding: whether it reads the pixel mask; what does not, takes images of one size.
        exports_any_size: whether tracing leaves an image's sides free; else an export is for images of one size.
        predictions_only: whether it can teach nothing but its predictions; false of every family.
        predicts_distributions: whether its boxes come from distributions over the distances of their edges.
        citation: BibTeX of the family's paper.
        unsaveable: why no stock checkpoint could hold this model, as an error tells it; None for nearly all.
    """

    stock_class: ClassVar[type[PreTrainedModel]]
    title: ClassVar[str]
    tag: ClassVar[str]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    layer_modules: ClassVar[tuple[str, ...]] = ("model.decoder.layers.",)
    reads_padding: ClassVar[bool] = True
    exports_any_size: ClassVar[bool] = True
    predictions_only: ClassVar[bool] = False
    predicts_distributions: ClassVar[bool] = False
    citation: ClassVar[str]
    unsaveable: str | None = None
    _read_classes: tuple[list[int], list[str]] | None = None

    # what a family says

    @abstractmethod
    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        """One pass over the model's own queries and the request's further groups, which cannot see each other.

        Logits and boxes leave autocast in float32 or wider.
        """

    @abstractmethod
    def criterion(self) -> DetectionCriterion:
        """The family's detection loss and label assignment, as this model's configuration weighs them."""

    @abstractmethod
    def static_queries(self) -> Queries | None:
        """The queries of the model's own group without a forward pass; None where they depend on the image."""

    @abstractmethod
    def new_queries(self, count: int) -> Queries:
        """Freshly drawn queries for a further group, as the family's authors draw their own."""

    @abstractmethod
    def prepare_attention(self) -> None:
        """Make the decoder's attention aware of groups; called once, when the model has been built."""

    @abstractmethod
    def initialise(self, names: Iterable[str] | None = None) -> None:
        """Set parameters to the start values of the family's authors, in place; the backbone is left as it is.

        Args:
            names: the parameters to set (as `named_parameters` calls them); all of them by default.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Set `requires_grad` of every parameter as the family's authors do."""

    @abstractmethod
    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        """Reduce the class heads to these classes in this order, in place, as a student inherits them.

        Args:
            index: int64 `(C,)`, the model's class for each of `names`.
        """

    @classmethod
    def check_config(cls, config) -> None:
        """Refuse values with which Transformers would build a model that fails in its first forward pass.

        Raises:
            ValueError: the message names the field and its value.
        """

    # what of its configuration others may ask

    @property
    @abstractmethod
    def width(self) -> int:
        """Hidden size of the decoder's queries."""

    @property
    def query_count(self) -> int:
        """Number of object queries of the model's own group at inference."""
        return self.config.num_queries

    @property
    def decoder_depth(self) -> int:
        """Number of decoder layers whose predictions are returned."""
        return self.config.decoder_layers

    @property
    def memory_levels(self) -> int:
        """Number of levels of the memory, all of the decoder's width."""
        return 1

    @property
    @abstractmethod
    def anchor_size(self) -> int:
        """Numbers of an anchor that a group may bring with its queries; 0 where the model takes none."""

    @property
    @abstractmethod
    def makes_anchors(self) -> bool:
        """Whether a head of the decoder makes anchors of queries, so that another model's can get theirs afresh.

        False where they belong to the queries, as proposals of an image do.
        """

    @property
    def skipped_layers(self) -> str | None:
        """What makes training skip decoder layers at random, as an error tells it; None where nothing does."""
        return None

    @property
    def side_divisor(self) -> int:
        """What both sides of every image must be multiples of, pixels; 1 where any will do."""
        return 1

    @property
    def only_size(self) -> tuple[int, int] | None:
        """The only height and width of images, pixels, that its configuration lets it take; None of nearly all."""
        return None

    def check_image(self, height: int, width: int) -> None:
        """Refuse a size of images, padding included, that the model cannot take; by default none. Pixels.

        Raises:
            ImageSizeError: the message names the size and what would do.
        """

    def try_image(self, pixel_values: torch.Tensor) -> DetectorOutput:
        """One pass over an image `(1, 3, height, width)`, as a model is tried before it is used.

        Raises:
            ValueError: a family finds that its configuration says something else than its memory shows.
        """
        return self(pixel_values, request=GroupRequest())

    @property
    def backbone_type(self) -> str:
        """What Transformers calls the backbone: its `model_type`."""
        return self.config.backbone_config.model_type

    @property
    def nameless_outputs(self) -> tuple[str, ...]:
        """Prefixes of tensors with a row a class of which only the first says something, of whatever class."""
        return ()

    @property
    @abstractmethod
    def backbone_module(self) -> nn.Module:
        """The backbone as a model of its own, into which pretrained weights go."""

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the model's outputs, or those that `read_classes` left."""
        return class_names_of(self.config) if self._read_classes is None else self._read_classes[1]

    @property
    def scores(self) -> Scores:
        """How its class logits are read: of all its classes, or of those that `read_classes` left."""
        scores = self.criterion().scores
        return scores if self._read_classes is None else SelectedScores(scores, self._read_classes[0])

    def read_classes(self, index: torch.Tensor, names: list[str]) -> None:
        """Let detections be of these classes alone (int64 `(C,)`, the model's class for each of `names`).

        Heads, logits and what is saved stay as they are, so a class scores what it scored among all.
        """
        self._read_classes = index.tolist(), names

    # what all families share

    def source_of(self, name: str, layer_map: list[int]) -> str:
        """The teacher's tensor that a student of the same family inherits as `name`.

        Args:
            layer_map: the teacher's decoder layer (from 0) for each of the student's, and last the number of its
                layers: what follows the student's last layer inherits from what follows the teacher's.
        """
        for prefix in self.layer_modules:
            if name.startswith(prefix):
                layer, rest = name.removeprefix(prefix).split(".", 1)
                return f"{prefix}{layer_map[int(layer)]}.{rest}"
        return name

    def __init_subclass__(cls, **kwargs):
        """Let `forward` say the stock class's arguments, which trainers and exporters read by name and place."""
        super().__init_subclass__(**kwargs)
        if "stock_class" in vars(cls):
            cls.forward = _with_arguments_of(cls.stock_class.forward, cls.forward)  # type: ignore[method-assign]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.query_adapters = nn.ModuleDict()
        self.prepare_attention()
        if self.device.type != "meta":
            self.initialise()
            self.freeze()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As in Transformers, in float32 by default; what the checkpoint lacks starts as in the paper."""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        new = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        if new:
            logger.warning(
                f"{len(new)} tensors are not in {pretrained_model_name_or_path} and start afresh, the first "
                f"{sorted(new)[:3]}"
            )
            model.initialise(new)
        model.freeze()
        return (model, info) if output_loading_info else model

    def forward(self, pixel_values=None, pixel_mask=None, *args, request: GroupRequest | None = None, **kwargs):
        """The stock forward pass, or with a `request` one pass over every query group.

        Args:
            pixel_values: `(B, 3, height, width)` float, normalised.
            pixel_mask: `(B, height, width)`, 1 on the image, 0 on padding; None means no padding.
            args, kwargs: for the stock forward pass only.
            request: further query groups and maps.

        Returns:
            What the stock class returns, or with a request a `DetectorOutput`.
        """
        if request is None:
            return super().forward(pixel_values, pixel_mask, *args, **kwargs)
        if args or kwargs:
            raise TypeError(
                f"with a request forward takes pixel_values and pixel_mask only, and got {[*args, *kwargs]}"
            )
        output = self.forward_groups(pixel_values, pixel_mask, request)
        if request.teacher_memory is not None:
            # by item: what is set as an attribute a distributed model would not find in the output
            output["compared_memory"] = self._compared(output.memory, request)
            if VIDT in self.query_adapters:
                carried: Any = self.query_adapters[VIDT]
                with torch.autocast(self.device.type, enabled=False):
                    output["carried_queries"] = carried.carried_queries(output.groups[OWN].hidden_states)
        return output

    def _compared(
        self, memory: tuple[MemoryLevel, ...], request: GroupRequest
    ) -> dict[str, tuple[ComparedLevel, ...] | DecodedInstances]:
        """By the memory adapter's name, its memory and the teacher's as that adapter hands them to its loss."""
        with torch.autocast(self.device.type, enabled=False):
            levels = compared_levels(memory, request.teacher_memory)
            return {
                name: adapter(levels, request.targets)
                for name, adapter in self.query_adapters.items()
                if isinstance(adapter, ComparesMemory)
            }

    def queries_of_groups(self, own: Queries, request: GroupRequest) -> dict[str, Queries]:
        """The model's own queries and those of the request, carried into its width, by the group's name."""
        further = {}
        for name, queries in request.queries.items():
            if queries is None and name not in self.query_adapters:
                raise ValueError(f"the query group {name!r} was given no queries, and the model holds none of its own")
            further[name] = self.query_adapters[name](queries) if name in self.query_adapters else queries
        return {OWN: own} | further

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, *args, **kwargs) -> None:
        """As in Transformers, but only non-reentrant: reentrant checkpointing would cut the maps off the gradient."""
        if (activation_checkpointing_kwargs or {}).get("use_reentrant", False):
            raise ValueError(
                "activation_checkpointing_kwargs: use_reentrant=True leaves attention maps without a gradient; "
                "use {'use_reentrant': False}"
            )
        chosen = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        super().activation_checkpointing_enable(chosen, *args, **kwargs)

    def role_of(self, name: str) -> str | None:
        """Which of `ROLES` a parameter plays, by its name; None for a query adapter's."""
        return next((role for role, prefixes in self.parts.items() if name.startswith(prefixes)), None)

    def freeze_part(self, role: str) -> None:
        """Let no parameter of a part train."""
        for name, parameter in self.named_parameters():
            if self.role_of(name) == role:
                parameter.requires_grad_(False)

    def to_stock(self) -> PreTrainedModel:
        """The same detector as a plain Transformers model sharing this one's tensors, without query adapters."""
        return self._stock_model(self.state_dict())

    def _stock_model(self, state_dict: dict[str, torch.Tensor]) -> PreTrainedModel:
        own = {name: value for name, value in state_dict.items() if not name.startswith(f"{ADAPTERS}.")}
        config = type(self.config).from_dict(self.config.to_dict())  # a copy that asks for no attention implementation
        with torch.device("meta"):
            stock = self.stock_class(config)
        stock.load_state_dict(own, strict=True, assign=True)
        first = {id(parameter): name for name, parameter in self.named_parameters()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name in own and name != first[id(parameter)]:  # assigned one by one, tied parameters have come apart
                module, _, leaf = name.rpartition(".")
                setattr(stock.get_submodule(module), leaf, stock.get_parameter(first[id(parameter)]))
        for name, buffer in self.named_buffers():  # those that no state dict holds, such as a Swin's index tables
            if name not in own and not name.startswith(f"{ADAPTERS}."):
                module, _, leaf = name.rpartition(".")
                setattr(stock.get_submodule(module), leaf, buffer)
        if self.unsaveable is not None:
            copy_dilation(self, stock)
        return stock.eval()

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs) -> None:
        """Write a plain stock checkpoint: no query adapter, no code of ours.

        Raises DetectorLoadError where `unsaveable` says why it would be another model.
        """
        if self.unsaveable is not None:
            raise DetectorLoadError(f"this model cannot be saved: {self.unsaveable}")
        stock = self._stock_model(self.state_dict() if state_dict is None else state_dict)
        stock.save_pretrained(save_directory, is_main_process, self.saved_tensors(stock), *args, **kwargs)

    def saved_tensors(self, stock: PreTrainedModel) -> dict[str, torch.Tensor] | None:
        """What a checkpoint holds; None for what Transformers writes, which is each tied tensor under one name."""
        return None


def _with_arguments_of(stock: Callable, forward: Callable) -> Callable:
    """The same forward pass, whose signature is the stock one's and `request`."""
    parameters = list(inspect.signature(stock).parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(place, inspect.signature(forward).parameters["request"])

    @functools.wraps(forward)
    def passed_on(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    passed_on.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return passed_on


def class_names_of(config) -> list[str]:
    """A detector's class names, in the order of its outputs."""
    return [config.id2label[index] for index in sorted(config.id2label)]


def inherit(student: Detector, teacher: Detector, roles: Iterable[str], class_index, layer_map: list[int]):
    """Copy the teacher's weights into the student where shapes allow, in place.

    Args:
        student, teacher: of one family.
        roles: which parts, of `ROLES`.
        class_index: int64 `(C,)`, the teacher's class for each of the student's.
        layer_map: the teacher's decoder layer (from 0) for each of the student's.

    Returns:
        The names of the tensors copied and of those left as they were, for their shapes or depth.
    """
    teacher = copy.deepcopy(teacher)
    teacher.keep_classes(class_index, student.class_names)
    source, copied, skipped = teacher.state_dict(), [], []
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if student.role_of(name) not in roles:
                continue
            tensor = source.get(student.source_of(name, [*layer_map, teacher.decoder_depth]))
            if tensor is None or tensor.shape != value.shape:
                skipped.append(name)
                continue
            value.copy_(tensor)
            copied.append(name)
    return copied, skipped
