"""What a detector costs at inference: parameters, floating-point operations and time."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3etr_hf.evaluation.timing import interleaved, seconds_of, spread

# where the parts of a Conditional DETR begin; what is in none of them are the heads, queries and projections
PARTS = {"backbone": "model.backbone", "encoder": "model.encoder", "decoder": "model.decoder"}
OTHER = "heads and projections"
MOST_SECONDS, MOST_ROUNDS, FEWEST_ROUNDS = 20, 50, 5


@torch.no_grad()
def count_cost(model: torch.nn.Module, pixel_values: torch.Tensor) -> dict:
    """Parameters and floating-point operations of one forward pass, whole and by part.

    Args:
        model: a stock Conditional DETR in eval mode.
        pixel_values: `(1, 3, height, width)` float32, one image as the image processor makes it.

    Returns:
        `parameters`; `flops` (an addition and a multiplication count as two; matrix products and convolutions only, as
        PyTorch counts them); `parts`: both for backbone, encoder, decoder and the rest; `height` and `width`, pixels.
    """
    counter = FlopCounterMode(display=False, depth=3)
    # fused attention kernels of a CPU are not counted: as plain matrix products they are
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(pixel_values=pixel_values)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(model).__name__
    parts = {
        part: {
            "parameters": sum(parameter.numel() for parameter in model.get_submodule(path).parameters()),
            "flops": flops.get(f"{root}.{path}", 0),
        }
        for part, path in PARTS.items()
    }
    total = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
    }
    parts[OTHER] = {key: total[key] - sum(part[key] for part in parts.values()) for key in total}
    height, width = pixel_values.shape[2:]
    return {**total, "parts": parts, "height": height, "width": width}


@torch.no_grad()
def measure_milliseconds(models: dict[str, tuple[torch.nn.Module, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Milliseconds of one forward pass of one image, the models by turns so that a busy machine hits all alike.

    Args:
        models: name → a model in eval mode and its `pixel_values` `(1, 3, height, width)`, on one device.

    Returns:
        Name → `{"median", "low", "high"}`: median and quartiles.
    """
    calls = {
        name: lambda model=model, pixels=pixels: model(pixel_values=pixels) for name, (model, pixels) in models.items()
    }
    once = sum(seconds_of(call) for call in calls.values())
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(MOST_SECONDS / once)))
    times = interleaved(calls, rounds, title="timing")
    return {name: spread(1000 * seconds) for name, seconds in times.items()}
