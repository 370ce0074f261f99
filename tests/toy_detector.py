"""A detector that shares no attribute with a family: it shows that the rest of the package asks a `Detector` alone.

A grid of patches proposes boxes; those of the best score are the queries, so they depend on the image. Attention to
the memory samples a few places around each box.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from d3etr_hf.losses import CrossEntropyCriterion, FocalCriterion
from d3etr_hf.models.detector import BACKBONE, DECODER, ENCODER, HEADS, QUERIES, Detector
from d3etr_hf.models.group_attention import attend
from d3etr_hf.outputs import (
    OWN,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    Queries,
    SampledAttention,
    Supervised,
    wide,
)
from d3etr_hf.outputs.attention_maps import valid_sizes

PATCH, SIGHTS, PLACES = 8, 2, 4


class ToyConfig(PreTrainedConfig):
    model_type = "toy_detector"

    def __init__(self, channels: int = 16, slots: int = 6, rounds: int = 2, softmax: bool = False, **options):
        self.channels, self.slots, self.rounds, self.softmax = channels, slots, rounds, softmax
        super().__init__(**options)


@dataclass
class ToyOutput(ModelOutput):
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None


class Round(nn.Module):
    """Queries look at each other, at places around their boxes, and think."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix, self.unmix = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.where, self.weigh = nn.Linear(channels, SIGHTS * PLACES * 2), nn.Linear(channels, SIGHTS * PLACES)
        self.take = nn.Linear(channels, channels)
        self.think = nn.Sequential(nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, channels))
        self.calm = nn.LayerNorm(channels)

    def forward(self, x, anchors, tokens, mask, with_map: bool):
        def sights(part):
            return part.unflatten(-1, (SIGHTS, -1)).transpose(1, 2)

        query, key, value = (sights(part) for part in self.mix(x).chunk(3, dim=-1))
        seen, self_map = attend(query, key, value, None, 0.0, query.shape[-1] ** -0.5, with_map)
        x = x + self.unmix(seen.transpose(1, 2).flatten(2))
        offsets = sights(self.where(x)).unflatten(-1, (PLACES, 2)).tanh()
        places = wide(anchors[:, None, :, None, :2] + offsets * anchors[:, None, :, None, 2:] / 2)
        weights = wide(sights(self.weigh(x))).softmax(-1)
        sampled = torch.stack(
            [self._look(tokens.flatten(2).mT, mask, places[:, sight], weights[:, sight]) for sight in range(SIGHTS)]
        )
        x = x + self.take(sampled.mean(0).to(x.dtype))
        return self.calm(x + self.think(x)), self_map, SampledAttention(places, weights)

    def _look(self, tokens, mask, places, weights):
        """Bilinear samples of the memory `(B, H*W, c)` at `(B, N, P, 2)` of the unpadded image, weighed."""
        rows, columns = valid_sizes(mask)
        extent = torch.stack([columns / mask.shape[2], rows / mask.shape[1]], dim=-1)[:, None, None]
        grid = 2 * places * extent - 1
        memory = wide(tokens).mT.unflatten(-1, mask.shape[1:])
        found = nn.functional.grid_sample(memory, grid, align_corners=False)
        return (found * weights[:, None]).sum(-1).mT


class ToyForObjectDetection(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        channels, outputs = config.channels, config.num_labels + config.softmax
        self.stem = nn.Conv2d(3, channels, PATCH, PATCH)
        self.grow = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        )
        self.propose = nn.ModuleDict({"what": nn.Linear(channels, outputs), "where": nn.Linear(channels, 4)})
        self.circles = nn.ModuleList(Round(channels) for _ in range(config.rounds))
        self.classify, self.regress = nn.Linear(channels, outputs), nn.Linear(channels, 4)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values, pixel_mask=None):
        output = self._run(pixel_values, pixel_mask, lambda own: {OWN: own}, GroupRequest())
        group = output.groups[OWN]
        return ToyOutput(logits=group.logits[-1], pred_boxes=group.boxes[-1])

    def _run(self, pixel_values, pixel_mask, groups_of, request: GroupRequest) -> DetectorOutput:
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.int64)
        mask = pixel_mask[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].bool()
        features = self.stem(pixel_values)
        tokens = features + self.grow(features) * mask[:, None]
        with torch.autocast(tokens.device.type, enabled=False):
            own, proposals = self._propose(wide(tokens), mask)
        queries, outputs = groups_of(own), {}
        for name, group in queries.items():
            outputs[name] = self._decode(group, tokens, mask, request)
        supervised = {"proposals": Supervised(group=proposals)}
        return DetectorOutput(groups=outputs, queries=own, memory_mask=mask, supervised=supervised)

    def _propose(self, tokens, mask) -> tuple[Queries, GroupOutput]:
        flat = tokens.flatten(2).mT
        logits, rows, columns = self.propose["what"](flat), *valid_sizes(mask)
        y, x = torch.meshgrid(
            *(torch.arange(size, device=flat.device) + 0.5 for size in mask.shape[1:]), indexing="ij"
        )
        centres = torch.stack([x.flatten() / columns[:, None], y.flatten() / rows[:, None]], dim=-1).clamp(max=1.0)
        start = torch.cat([centres, torch.full_like(centres, 0.2)], dim=-1)
        boxes = (start.logit(1e-3) + self.propose["where"](flat)).sigmoid()
        objects = logits[..., : self.config.num_labels].amax(-1).masked_fill(~mask.flatten(1), -torch.inf)
        best = objects.topk(self.config.slots, dim=1).indices[..., None]

        def chosen(part):
            return part.take_along_dim(best, dim=1)

        proposals = GroupOutput(logits=chosen(logits)[None], boxes=chosen(boxes)[None])
        return Queries(content=chosen(flat), anchors=chosen(boxes).detach()), proposals

    def _decode(self, queries: Queries, tokens, mask, request: GroupRequest) -> GroupOutput:
        batch = len(tokens)
        x = (queries.position if queries.content is None else queries.content).expand(batch, -1, -1)
        anchors = self._anchors(queries, x)
        logits, boxes, self_maps, cross_maps = [], [], [], []
        for circle in self.circles:
            x, self_map, sampled = circle(x, anchors, tokens, mask, request.self_attention)
            with torch.autocast(x.device.type, enabled=False):
                logits.append(self.classify(wide(x)))
                boxes.append((anchors.logit(1e-3) + self.regress(wide(x))).sigmoid())
            self_maps.append(self_map)
            cross_maps.append(sampled)
        return GroupOutput(
            logits=torch.stack(logits),
            boxes=torch.stack(boxes),
            self_attention=tuple(self_maps) if request.self_attention else None,
            cross_attention=tuple(cross_maps) if request.cross_attention else None,
        )

    @staticmethod
    def _anchors(queries: Queries, x: torch.Tensor) -> torch.Tensor:
        """Boxes; around the points of another family, and the whole image where there are none."""
        if queries.anchors is None:
            return x.new_tensor([0.5, 0.5, 1, 1], dtype=torch.float32).expand(*x.shape[:2], 4)
        anchors = wide(queries.anchors).expand(*x.shape[:2], -1)
        return anchors if anchors.shape[-1] == 4 else torch.cat([anchors, torch.full_like(anchors, 0.2)], dim=-1)


class ToyDetector(Detector, ToyForObjectDetection):
    stock_class = ToyForObjectDetection
    title = "Toy"
    tag = "toy"
    anchor_size = 4
    makes_anchors = False
    citation = "@misc{toy}"
    parts = {
        BACKBONE: ("stem.",),
        ENCODER: ("grow.",),
        DECODER: ("circles.",),
        HEADS: ("classify.", "regress."),
        QUERIES: ("propose.",),
    }

    width = property(lambda self: self.config.channels)
    query_count = property(lambda self: self.config.slots)
    decoder_depth = property(lambda self: self.config.rounds)

    def forward_groups(self, pixel_values, pixel_mask, request) -> DetectorOutput:
        return self._run(pixel_values, pixel_mask, lambda own: self.queries_of_groups(own, request), request)

    def criterion(self):
        weights = 2.0, 5.0, 2.0, 1.0, 5.0, 2.0
        return CrossEntropyCriterion(*weights, 0.1) if self.config.softmax else FocalCriterion(*weights)

    def static_queries(self) -> None:
        return None

    def new_queries(self, count: int) -> Queries:
        sizes = torch.full((count, 2), 0.3)
        return Queries(content=torch.randn(count, self.width), anchors=torch.cat([torch.rand(count, 2), sizes], -1))

    @property
    def backbone_module(self) -> nn.Module:
        return self.stem

    def prepare_attention(self) -> None:
        pass

    @torch.no_grad()
    def initialise(self, names=None) -> None:
        chosen = set(dict(self.named_parameters()) if names is None else names)
        for name, module in self.named_modules():
            if hasattr(module, "reset_parameters") and f"{name}.weight" in chosen:
                module.reset_parameters()
        for head in (self.classify, self.propose["what"]):
            head.bias.fill_(0.0 if self.config.softmax else -2.0)

    def freeze(self) -> None:
        self.requires_grad_(True)

    def keep_classes(self, index: torch.Tensor, names: list[str]) -> None:
        if self.config.softmax:
            index = torch.cat([index, index.new_tensor([self.config.num_labels])])
        for head in (self.classify, self.propose["what"]):
            head.weight, head.bias = nn.Parameter(head.weight[index]), nn.Parameter(head.bias[index])
            head.out_features = len(index)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: label for label, name in enumerate(names)}

    def source_of(self, name: str, layer_map: list[int]) -> str:
        if not name.startswith("circles."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"circles.{layer_map[int(layer)]}.{rest}"


def toy_model(seed: int = 0, **changes) -> ToyDetector:
    """A small one for the shapes' three classes."""
    torch.manual_seed(seed)
    names = ["circle", "rectangle", "triangle"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    return ToyDetector(ToyConfig(**(labels | changes))).eval()
