"""The largest difference between timm's ResNets and Transformers' own with timm's weights, dilated ones included.

    python scripts/compare_timm.py

Needs timm (pip install timm) and the torchvision of torch's own build; random weights and batch norm statistics,
nothing is downloaded.
"""

import itertools
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import ResNetBackbone, TimmBackboneConfig

from d3etr_hf.models.timm_names import RESNETS, TIMM_NAMES, dilate_last_stage, native_resnet

STRIDES = (32, 16)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random batch norm parameters and statistics, in place, about such that activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))


def renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's tensors by Transformers' names."""
    names = {}
    for name, value in state_dict.items():
        name = f"backbone.model.{name}"
        for pattern, target in TIMM_NAMES.items():
            name = re.sub(pattern, target, name)
        names[name.removeprefix("backbone.model.")] = value
    return names


@torch.no_grad()
def differences(name: str, output_stride: int) -> Iterator[tuple[float, float]]:
    """Of each of the four stages the largest difference and the largest feature, for an image of odd size."""
    import timm

    theirs = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), output_stride=output_stride)
    randomise(theirs)
    ours = ResNetBackbone(native_resnet(TimmBackboneConfig(backbone=name, out_indices=[1, 2, 3, 4])))
    ours.load_state_dict(renamed(theirs.state_dict()), strict=True)
    if output_stride == 16:
        dilate_last_stage(ours)
    pixels = torch.randn(1, 3, 149, 203, generator=torch.Generator().manual_seed(1))
    for wanted, found in zip(theirs.eval()(pixels), ours.eval()(pixels).feature_maps, strict=True):
        assert wanted.shape == found.shape, (wanted.shape, found.shape)
        yield (wanted - found).abs().max().item(), wanted.abs().max().item()


def main() -> None:
    """A line for each ResNet."""
    for name, output_stride in itertools.product(RESNETS, STRIDES):
        found = list(differences(name, output_stride))
        worst, largest = max(found, key=lambda each: each[0] / each[1])
        print(f"{name:<10} output_stride {output_stride}: {worst:.1e} of {largest:.1e} ({worst / largest:.0e})")


if __name__ == "__main__":
    main()
