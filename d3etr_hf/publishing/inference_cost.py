"""What a detector costs at inference: parameters, floating-point operations and time."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3etr_hf.evaluation.timing import interleaved, seconds_of, spread
from d3etr_hf.models.detector import Detector

OTHER = "other"
MOST_SECONDS, MOST_ROUNDS, FEWEST_ROUNDS = 20, 50, 5


@torch.no_grad()
def count_cost(detector: Detector, pixel_values: torch.Tensor) -> dict:
    """Parameters and floating-point operations of one forward pass of the stock model, whole and by part.

    Args:
        pixel_values: `(1, 3, height, width)` float32, one image as the image processor makes it.

    Returns:
        `parameters`; `flops` (an addition and a multiplication count as two; matrix products and convolutions only, as
        PyTorch counts them); `parts`: both for each of the detector's parts, and "other" for what is in none of them,
        if there is any; `height` and `width`, pixels.
    """
    # the counter asks for the gradient function of what modules are given, and a parameter that is has none here
    model = detector.to_stock().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    # fused attention kernels of a CPU are not counted: as plain matrix products they are
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(pixel_values=pixel_values)
    flops = own_operations(counter)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parts = {role: {"parameters": 0, "flops": 0} for role in detector.parts}
    for key, counts in (("parameters", sizes), ("flops", {f"{name}.": count for name, count in flops.items()})):
        for name, count in counts.items():
            if (role := detector.role_of(name)) is not None:
                parts[role][key] += count
    total = {
        "parameters": sum(sizes.values()),
        "flops": counter.get_total_flops(),
    }
    rest = {key: total[key] - sum(part[key] for part in parts.values()) for key in total}
    if any(rest.values()):
        parts[OTHER] = rest
    height, width = pixel_values.shape[2:]
    return {**total, "parts": parts, "height": height, "width": width}


def own_operations(counter: FlopCounterMode) -> dict[str, int]:
    """Operations of every module that was called, without those of the modules in it, by its name in the model.

    What only holds modules, as a list of layers does, is never called, and so has no count to be read.
    """
    # by the module's path, which begins with the model's class
    counts = {
        name.partition(".")[2]: sum(by.values()) for name, by in counter.get_flop_counts().items() if name != "Global"
    }
    own = dict(counts)
    for name, count in counts.items():
        above = name
        while above:
            above = above.rpartition(".")[0]
            if above in counts:
                own[above] -= count
                break
    return own


@torch.no_grad()
def measure_milliseconds(models: dict[str, tuple[torch.nn.Module, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Milliseconds that one image takes in a forward pass, the models by turns so that a busy machine hits all alike.

    Args:
        models: name → a model in eval mode and its `pixel_values` `(B, 3, height, width)`, on one device.

    Returns:
        Name → `{"median", "low", "high"}`: median and quartiles.
    """
    calls = {
        name: lambda model=model, pixels=pixels: model(pixel_values=pixels) for name, (model, pixels) in models.items()
    }
    once = sum(seconds_of(call) for call in calls.values())
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(MOST_SECONDS / once)))
    times = interleaved(calls, rounds, title="timing")
    return {name: spread(1000 * seconds / len(models[name][1])) for name, seconds in times.items()}
