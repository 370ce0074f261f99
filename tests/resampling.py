"""Sampled attention against the module that it is of: the memory sampled once more at the places, weighed."""

from collections.abc import Callable

import torch

from d3etr_hf.outputs import OWN, GroupRequest


def check_resampled(
    model,
    pixels: torch.Tensor,
    points: list[int],
    nearest: bool = False,
    value: Callable = lambda module, memory: memory,
    result: Callable = lambda module, found: found,
) -> None:
    """Every layer's places and weights give what its module gave.

    Args:
        points: number of points in each level.
        nearest: whether the module reads single pixels.
        value, result: what the module does to the memory before it is sampled, and to what it has found.
    """
    seen = []
    for layer in model.model.decoder.layers:
        layer.encoder_attn.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    group = model(pixels, request=GroupRequest(cross_attention=True)).groups[OWN]
    assert len(seen) == len(group.cross_attention) == 3
    for (module, _, arguments, output), attention in zip(seen, group.cross_attention, strict=True):
        batch, heads = attention.weights.shape[:2]
        shapes, found = arguments["spatial_shapes_list"], 0
        levels = zip(
            value(module, arguments["encoder_hidden_states"]).split([h * w for h, w in shapes], dim=1),
            shapes,
            attention.places.split(points, dim=3),
            attention.weights.split(points, dim=3),
            strict=True,
        )
        for tokens, (height, width), places, weights in levels:
            grid = tokens.reshape(batch, height, width, heads, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
            samples = torch.nn.functional.grid_sample(
                grid, 2 * places.flatten(0, 1) - 1, mode="nearest" if nearest else "bilinear", align_corners=False
            )
            found = found + (samples.unflatten(0, (batch, heads)) * weights[:, :, None]).sum(-1)
        again = result(module, found.permute(0, 3, 1, 2).flatten(2))
        torch.testing.assert_close(again, output[0], atol=1e-5, rtol=0)
