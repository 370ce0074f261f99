"""What the families share whose decoder samples a memory of several levels, with queries that its model chooses."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.models.dense_memory import AssumeFinite
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.group_attention import route_attention
from d3etr_hf.models.group_decoder import DecoderPass, GroupDecoder
from d3etr_hf.models.initialisation import reset_but
from d3etr_hf.models.query_adapters import FRESH_SIDE
from d3etr_hf.outputs import (
    AUXILIARY,
    OWN,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    MemoryLevel,
    Queries,
    Supervised,
    Targets,
    wide,
)


class SampledMemoryDetector(Detector):
    """A family whose stock model hands a decoder its queries, and whose decoder samples the memory.

    Attributes:
        group_decoder: the family's decoder for several groups.
        eager_attention: its eager attention function.
        memory_module: name of the module whose output is the memory.
        class_outputs: prefixes of the modules with one row a class (and, in an embedding, a last one for padding).
    """

    group_decoder: ClassVar[type[GroupDecoder]]
    eager_attention: ClassVar[Any]
    memory_module: ClassVar[str] = "model.encoder"
    class_outputs: ClassVar[tuple[str, ...]]
    model: Any
    reads_padding = False
    exports_any_size = False  # shapes of levels are Python's numbers, of which tensors are made

    # what a family says

    @abstractmethod
    def predictions(self, output, decoder_pass: DecoderPass) -> tuple[torch.Tensor, ...]:
        """Logits and boxes `(L, B, sum of N, ·)` of all groups, from what the stock base model returned.

        What follows them, if anything, is what `DecoderPass.outputs` takes of box distributions.
        """

    @abstractmethod
    def start_values(self) -> None:
        """Set parameters outside the backbone as the family's authors do, after PyTorch's own start values."""

    def supervised(
        self, outputs: dict[str, GroupOutput], output, decoder_pass: DecoderPass, request: GroupRequest
    ) -> dict[str, Supervised]:
        """Predictions that only ground truth supervises, in training; groups of that kind are taken out of outputs."""
        return {}

    def model_arguments(self, request: GroupRequest) -> dict[str, Any]:
        """What the stock base model takes beside the image."""
        return {}

    # what all share

    @property
    def width(self) -> int:
        return self.config.d_model

    @property
    def memory_levels(self) -> int:
        return self.config.num_feature_levels

    @property
    def anchor_size(self) -> int:
        return 4

    @property
    def makes_anchors(self) -> bool:
        return False

    def prepare_attention(self) -> None:
        decoder = self.model.decoder
        decoder.__class__ = self.group_decoder  # the same module, and the same names in every checkpoint
        # what output_hidden_states and output_attentions record is kept by the class that a module was built as
        _CAN_RECORD_REGISTRY[decoder] = decoder._can_record_outputs
        route_attention(self.config, [layer.self_attn for layer in decoder.layers], (), type(self).eager_attention)

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        self.check_image(*pixel_values.shape[-2:])

        def queries_of(own: Queries) -> dict[str, Queries]:
            return self.queries_of_groups(own, request)

        with self.model.decoder.taking(request, queries_of) as decoder_pass, self.full_precision():
            output = self.model(pixel_values, pixel_mask=pixel_mask, **self.model_arguments(request))
            outputs = decoder_pass.outputs(*self.predictions(output, decoder_pass))
            supervised = self.supervised(outputs, output, decoder_pass, request) if self.training else {}
            if request.hidden_states:
                states = decoder_pass.groups.split(wide(output.last_hidden_state), 1)
                for name, group in outputs.items():
                    group["hidden_states"] = states[name]
        levels = self.memory_of(decoder_pass)
        return DetectorOutput(
            groups={name: group for name, group in outputs.items() if name in (OWN, AUXILIARY, *request.queries)},
            queries=decoder_pass.own,
            memory_mask=levels[min(1, len(levels) - 1)].mask,  # the second finest, or the only one
            supervised=supervised or None,
            memory=levels if request.memory else None,
        )

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within this context the stock model leaves autocast with its memory.

        Half precision would round the anchors, the places that are sampled and the boxes by a tenth of a small
        object's size. Nor does the memory's module ask whether it is finite; see `AssumeFinite`.
        """
        memory_module = self.get_submodule(self.memory_module)
        with ExitStack() as stack:
            assumed = stack.enter_context(ExitStack())

            def assume_finite(module: nn.Module, args: tuple) -> None:
                if not torch.compiler.is_compiling():
                    assumed.enter_context(AssumeFinite())

            def leave_autocast(module: nn.Module, args: tuple, memory):
                assumed.close()
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
                return _as(memory, self.dtype)

            stack.enter_context(memory_module.register_forward_pre_hook(assume_finite))
            stack.enter_context(memory_module.register_forward_hook(leave_autocast))
            yield

    def memory_of(self, decoder_pass: DecoderPass) -> tuple[MemoryLevel, ...]:
        """The memory that the decoder was given, in its order."""
        shapes = [tuple(shape) for shape in decoder_pass.arguments["spatial_shapes_list"]]
        sizes = [math.prod(shape) for shape in shapes]
        memory = decoder_pass.arguments["encoder_hidden_states"]
        if self.reads_padding:
            masks = decoder_pass.arguments["encoder_attention_mask"].split(sizes, dim=1)
        else:
            masks = memory.new_ones(memory.shape[:2], dtype=torch.bool).split(sizes, dim=1)
        parts = zip(memory.split(sizes, dim=1), masks, shapes, strict=True)
        return tuple(
            MemoryLevel(tokens.mT.unflatten(-1, shape), mask.unflatten(1, shape)) for tokens, mask, shape in parts
        )

    def check_tokens(self, tokens: int, height: int, width: int) -> None:
        """Refuse an image whose memory has fewer tokens than queries are chosen from it.

        Raises:
            ImageSizeError: the message names both numbers and the image's size, pixels.
        """
        if tokens < self.query_count:
            raise ImageSizeError(
                f"num_queries is {self.query_count}, but the memory of an image of {width} x {height} pixels has only "
                f"{tokens} tokens: take larger images or fewer queries"
            )

    def static_queries(self) -> Queries | None:
        return None

    def new_queries(self, count: int) -> Queries:
        """Content N(0, 1), as what is normed; boxes anywhere."""
        sides = torch.full((count, 2), FRESH_SIDE)
        return Queries(content=torch.randn(count, self.width), anchors=torch.cat([torch.rand(count, 2), sides], dim=1))

    @torch.no_grad()
    def initialise(self, names: Iterable[str] | None = None) -> None:
        chosen = set(dict(self.named_parameters(remove_duplicate=False)) if names is None else names)
        with reset_but(self, self.backbone_module, chosen):
            self.start_values()

    @torch.no_grad()
    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        kept: dict[int, nn.Parameter] = {}  # heads may be one and the same, or share their weights
        for name, module in self.named_modules():
            if name.startswith(self.class_outputs) and isinstance(module, (nn.Linear, nn.Embedding)):
                _keep_rows(module, index, kept)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: label for label, name in enumerate(names)}


def _keep_rows(module: nn.Linear | nn.Embedding, index: torch.Tensor, kept: dict[int, nn.Parameter]) -> None:
    rows = index
    if isinstance(module, nn.Embedding):
        rows = torch.cat([index, index.new_tensor([module.num_embeddings - 1])])
        module.num_embeddings, module.padding_idx = len(rows), len(rows) - 1
    else:
        module.out_features = len(rows)
    for leaf, value in list(module.named_parameters(recurse=False)):
        if id(value) not in kept:
            kept[id(value)] = nn.Parameter(value[rows], requires_grad=value.requires_grad)
        setattr(module, leaf, kept[id(value)])


def _as(value, dtype: torch.dtype):
    """Floating-point tensors in this precision, in whatever holds them; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _as(part, dtype) for name, part in value.items()})
    return type(value)(_as(part, dtype) for part in value) if isinstance(value, list | tuple) else value


def labels_of(targets: Targets) -> list[dict[str, torch.Tensor]]:
    """The ground truth as Transformers' models take it, image by image."""
    images = zip(targets.class_labels, targets.boxes, targets.counts, strict=True)
    return [{"class_labels": classes[:count], "boxes": boxes[:count]} for classes, boxes, count in images]
