"""What each decoder layer of a detector adds, and where its attention goes."""

from dataclasses import asdict, dataclass

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from d3etr_hf.data import DetectionCollator, DetectionDataset
from d3etr_hf.errors import EvaluationError
from d3etr_hf.evaluation.detections import select_detections
from d3etr_hf.evaluation.prediction import average_precision_of
from d3etr_hf.models.detector import Detector
from d3etr_hf.outputs import OWN, GroupOutput, GroupRequest, SampledAttention, Targets
from d3etr_hf.outputs.attention_maps import valid_sizes

# a query or a cell of the memory that gets so many times its even share of attention is a sink
SINK = 3.0


@dataclass(frozen=True)
class LayerStructure:
    """One decoder layer, on a validation split.

    Attributes:
        AP, AP50: COCO average precision (0..1) of the layer's own predictions.
        self_sinks: mean number of queries of an image that get more than `SINK` times their even share of
            self-attention, over heads and queries.
        self_sink_mass: their share of it, 0..1.
        cross_sinks, cross_sink_mass: likewise of cells of the memory in cross-attention, over the image alone.
        cross_on_objects: share of cross-attention in cells whose centre lies in a ground-truth box, 0..1; of images
            with objects.
        object_area: share of the image's cells that do, 0..1: what attention spread evenly would give.
    """

    AP: float
    AP50: float
    self_sinks: float
    self_sink_mass: float
    cross_sinks: float
    cross_sink_mass: float
    cross_on_objects: float
    object_area: float


@torch.no_grad()
def layer_structures(model: Detector, dataset: DetectionDataset, batch_size: int = 8) -> list[LayerStructure]:
    """Every decoder layer of a detector, from one pass over the data.

    Args:
        model: it is left in eval mode, on its device.
        dataset: with a `DetectionTransform`.
        batch_size: predictions depend a little on which images share a batch.

    Raises:
        EvaluationError: the data set has no object, so that there is no average precision.
        ValueError: a detection is not finite.
    """
    if all(annotation.get("iscrowd", 0) for annotation in dataset.ground_truth["annotations"]):
        raise EvaluationError(
            f"{dataset.name}: none of its {len(dataset)} images has an object that is not a crowd region, so there is "
            "no average precision of a layer: choose another validation split, or more of its images"
        )
    model.eval()
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=DetectionCollator())
    detections: list[list[torch.Tensor]] = [[] for _ in range(model.decoder_depth)]
    attention: list[list[torch.Tensor]] = [[] for _ in range(model.decoder_depth)]
    for batch in tqdm(loader, desc="layers", leave=False):
        pixels, mask = (batch[name].to(model.device) for name in ("pixel_values", "pixel_mask"))
        request = GroupRequest(self_attention=True, cross_attention=True)
        output = model(pixels.to(model.dtype), mask, request=request)
        targets = Targets.from_packed(
            batch["targets"].to(model.device), [label["objects"] for label in batch["labels"]]
        )
        group, inside = output.groups[OWN], cells_in_objects(targets, output.memory_mask)
        sizes = torch.tensor([label["orig_size"] for label in batch["labels"]])
        for layer in range(model.decoder_depth):
            found = select_detections(model.scores, group.logits[layer], group.boxes[layer], sizes)
            detections[layer].append(found.cpu())
            attention[layer].append(_attention_of(group, layer, output.memory_mask, inside).cpu())
    layers = []
    for of_layer, seen in zip(detections, attention, strict=True):
        metrics = average_precision_of(torch.cat(of_layer), dataset)
        means = torch.cat(seen).double().nanmean(0).tolist()
        layers.append(LayerStructure(metrics["AP"], metrics["AP50"], *means))
    return layers


def _attention_of(group: GroupOutput, layer: int, memory_mask: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """`(B, 6)`, the figures of `LayerStructure` that are of attention, in its order; NaN where there is no object."""
    to_queries = group.self_attention[layer].probability
    cross = group.cross_attention[layer]
    to_cells = (cross.on_grid(memory_mask) if isinstance(cross, SampledAttention) else cross).probability
    received = to_cells.mean((1, 2))
    image = memory_mask.flatten(1)
    everywhere = torch.ones_like(to_queries[:, 0, 0], dtype=torch.bool)
    on_objects = (received * inside).sum(-1)
    area = (inside & image).sum(-1) / image.sum(-1)
    of_objects = torch.stack([on_objects, area], dim=-1)
    of_objects = of_objects.masked_fill(~inside.any(-1, keepdim=True), torch.nan)
    return torch.cat([sinks(to_queries.mean((1, 2)), everywhere), sinks(received, image), of_objects], dim=-1)


def sinks(received: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """How many keys get more than `SINK` times their even share of attention, and what share of it together.

    Args:
        received: `(B, keys)`, the mean attention that each key gets; every row sums to one.
        valid: bool `(B, keys)`, among which attention can be shared.

    Returns:
        `(B, 2)`.
    """
    are = (received * valid.sum(-1, keepdim=True) > SINK) & valid
    return torch.stack([are.sum(-1).to(received.dtype), (received * are).sum(-1)], dim=-1)


def cells_in_objects(targets: Targets, memory_mask: torch.Tensor) -> torch.Tensor:
    """Which cells of the memory have their centre in a ground-truth box: bool `(B, H*W)`.

    Args:
        targets: the ground truth.
        memory_mask: bool `(B, H, W)`, true on the image, which fills whole rows and columns from the top left.
    """
    _, height, width = memory_mask.shape
    rows, columns = valid_sizes(memory_mask)
    y = (torch.arange(height, device=rows.device) + 0.5) / rows[:, None]
    x = (torch.arange(width, device=rows.device) + 0.5) / columns[:, None]
    centre, size = targets.boxes[..., :2], targets.boxes[..., 2:]
    in_x = (x[:, None] - centre[..., :1]).abs() <= size[..., :1] / 2
    in_y = (y[:, None] - centre[..., 1:]).abs() <= size[..., 1:] / 2
    inside = in_y[..., :, None] & in_x[..., None, :] & targets.present[..., None, None]
    return (inside.any(1) & memory_mask).flatten(1)


def as_rows(layers: list[LayerStructure]) -> list[dict[str, float]]:
    """As plain numbers, for a file."""
    return [asdict(layer) for layer in layers]
