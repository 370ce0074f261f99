"""A stock decoder that takes the queries of further groups beside those that its model hands it.

For families whose decoder is given its queries as arguments: a family derives `class Group...(GroupDecoder, stock
decoder)` and turns its model's decoder into one. The stock model, encoder, query selection and denoising included,
runs as it is; without `taking` so does the decoder.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from d3etr_hf.models.group_attention import GroupAttention
from d3etr_hf.outputs import OWN, GroupOutput, GroupRequest, Queries, SampledAttention, wide


@dataclass
class DecoderPass:
    """What goes into one pass over several groups and what is seen on the way.

    Attributes:
        request: the maps that are asked for.
        queries_of: all groups' queries, given the model's own.
        groups: how the queries are grouped; known when the decoder has been called.
        own: the queries of the model's own group.
        arguments: the decoder's, with the queries of all groups.
        sampled: per layer the attention to the memory, of all groups.
    """

    request: GroupRequest
    queries_of: Callable[[Queries], dict[str, Queries]]
    groups: GroupAttention = field(default_factory=lambda: GroupAttention({}, False, False))
    own: Queries = field(default_factory=Queries)
    arguments: dict[str, Any] = field(default_factory=dict)
    sampled: list[SampledAttention] = field(default_factory=list)

    def outputs(
        self,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        distribution: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        bins: torch.Tensor | None = None,
    ) -> dict[str, GroupOutput]:
        """By the group's name, predictions `(L, B, sum of N, ·)` and maps.

        Args:
            distribution, reference, bins: of boxes that come from distributions, as in `GroupOutput`, of all groups.
        """
        logits_of, boxes_of = (self.groups.split(wide(part), 2) for part in (logits, boxes))
        distribution_of = {} if distribution is None else self.groups.split(wide(distribution), 2)
        reference_of = {} if reference is None else self.groups.split(wide(reference), 1)
        sampled_of = [tuple(self.groups.split(wide(part), 2) for part in layer) for layer in self.sampled]
        return {
            name: GroupOutput(
                logits=logits_of[name],
                boxes=boxes_of[name],
                self_attention=self._self_attention(name),
                cross_attention=tuple(SampledAttention(p[name], w[name]) for p, w in sampled_of) or None,
                box_distribution=distribution_of.get(name),
                box_reference=reference_of.get(name),
                box_bins=bins,
            )
            for name in self.groups.sizes
        }

    def _self_attention(self, name: str):
        maps = tuple(layer[name] for layer in self.groups.self_maps)
        return maps if maps and maps[0] is not None else None


class GroupDecoder(nn.Module, ABC):
    """Stands before a stock decoder class.

    Attributes:
        query_arguments: the decoder's keyword arguments that hold one row a query, `(B, N, ·)`; the first is content.
    """

    query_arguments: ClassVar[tuple[str, ...]]
    going_on: DecoderPass | None = None

    # what a family says

    @abstractmethod
    def own_groups(self, count: int) -> dict[str, int]:
        """The groups among the queries that the stock model hands over, by name, in their order."""

    @abstractmethod
    def queries_from(self, arguments: Mapping[str, torch.Tensor]) -> Queries:
        """Query arguments, `(B, N, ·)` each, as queries."""

    @abstractmethod
    def arguments_from(self, queries: Queries) -> dict[str, torch.Tensor]:
        """Another model's queries, carried into this one's width, as query arguments `(N, ·)` or `(B, N, ·)`."""

    @abstractmethod
    def sampling_modules(self) -> list[nn.Module]:
        """Per layer the module whose forward pass `sampled_by` reads."""

    @abstractmethod
    def sampled_by(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output) -> SampledAttention:
        """Attention to the memory, from one call of a sampling module."""

    def in_the_image(self, sampled: SampledAttention, arguments: Mapping[str, Any]) -> SampledAttention:
        """The same with places in 0..1 of the unpadded image; by default they are there.

        A step of its own: what a layer computes on the side, activation checkpointing would miss the second time.
        """
        return sampled

    def see(self, groups: GroupAttention, arguments: dict[str, Any]) -> None:
        """Say which of the model's own groups see which, and take the mask that said so from the arguments."""

    # what all share

    @contextmanager
    def taking(self, request: GroupRequest, queries_of: Callable) -> Iterator[DecoderPass]:
        """Within this context the next pass is over all groups; it is told of in what is handed over."""
        self.going_on = DecoderPass(request, queries_of)
        try:
            yield self.going_on
        finally:
            self.going_on = None

    def forward(self, *args, **kwargs):
        """As the stock decoder, which its model calls by keyword."""
        if self.going_on is None:
            return super().forward(*args, **kwargs)
        going_on = self.going_on
        going_on.arguments = self._widened(going_on, kwargs)
        with ExitStack() as stack:
            if going_on.request.cross_attention:
                for module in self.sampling_modules():
                    hook = partial(self._record, going_on.sampled)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            output = super().forward(**going_on.arguments, groups=going_on.groups)
        going_on.sampled = [self.in_the_image(layer, going_on.arguments) for layer in going_on.sampled]
        going_on.groups.open = False
        return output

    def _widened(self, going_on: DecoderPass, arguments: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments with the queries of all groups."""
        given = {name: arguments[name] for name in self.query_arguments}
        batch, count = given[self.query_arguments[0]].shape[:2]
        sizes = self.own_groups(count)
        start = sum(size for name, size in list(sizes.items())[: list(sizes).index(OWN)])
        own = {name: value[:, start : start + sizes[OWN]] for name, value in given.items()}
        going_on.own = self.queries_from(own)
        further = {name: queries for name, queries in going_on.queries_of(going_on.own).items() if name != OWN}
        sizes |= {name: len(queries) for name, queries in further.items()}
        request = going_on.request
        going_on.groups = GroupAttention(sizes, request.self_attention, False, masks=dict(request.masks))
        self.see(going_on.groups, arguments)
        added = [self.arguments_from(queries) for queries in further.values()]
        for name, value in given.items():
            rows = [part[name].to(value.dtype).expand(batch, -1, -1) for part in added]
            arguments[name] = torch.cat([value, *rows], dim=1)
        return arguments

    def _record(self, sampled: list[SampledAttention], module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        sampled.append(self.sampled_by(module, args, kwargs, output))


def sampled_in(locations: torch.Tensor, weights: torch.Tensor) -> SampledAttention:
    """Places `(B, N, M, levels, P, 2)` and weights `(B, N, M, levels, P)`, as decoders have them, over all levels."""
    return SampledAttention(locations.transpose(1, 2).flatten(3, 4), weights.transpose(1, 2).flatten(3))


def without_padding(sampled: SampledAttention, valid_ratios: torch.Tensor) -> SampledAttention:
    """Places in 0..1 of the padded levels, of valid parts `(B, levels, 2)`, as places in 0..1 of the image."""
    places = sampled.places.unflatten(3, (valid_ratios.shape[1], -1)) / valid_ratios[:, None, None, :, None]
    return sampled._replace(places=places.flatten(3, 4))


def sampled_around(
    boxes: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    nearest: tuple[list[int], list[tuple[int, int]]] | None = None,
) -> SampledAttention:
    """The attention of decoders that sample around boxes, with any number of points in a level.

    Args:
        boxes: `(B, N, 1, 4)`, cxcywh in 0..1.
        offsets: `(B, N, M, P, 2)` from the centre, as a share of the box's size; P are the points of all levels.
        weights: `(B, N, M, P)`.
        nearest: where the nearest pixel is read: each level's number of points, and its height and width.
    """
    places = boxes[:, :, None, :, :2] + offsets * boxes[:, :, None, :, 2:]
    if nearest is not None:
        levels = zip(places.split(nearest[0], dim=3), nearest[1], strict=True)
        places = torch.cat([_pixels(part, height, width) for part, (height, width) in levels], dim=3)
    return SampledAttention(places.transpose(1, 2), weights.transpose(1, 2))


def _pixels(places: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Centres of the pixels that a decoder reads which rounds its places `(..., 2)`; without a gradient, as there."""
    x, y = (places[..., axis] * size + 0.5 for axis, size in enumerate((width, height)))
    x, y = x.long().clamp(0, width - 1), y.long().clamp(0, height - 1)
    return torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=-1).to(places.dtype)
