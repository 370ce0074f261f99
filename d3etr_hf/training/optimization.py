"""Parameter groups and the paper's learning rate schedule."""

import torch

from d3etr_hf.models.detector import BACKBONE, Detector


def parameter_groups(model: Detector, learning_rate: float, backbone_learning_rate: float, weight_decay: float):
    """What trains, in two groups: everything but the backbone first (Trainer logs its learning rate), the backbone.

    Returns:
        Groups as `torch.optim` takes them, none of them empty.
    """
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[model.role_of(name) == BACKBONE].append(parameter)
    rates = {False: learning_rate, True: backbone_learning_rate}
    return [
        {"params": parameters, "lr": rates[is_backbone], "weight_decay": weight_decay}
        for is_backbone, parameters in groups.items()
        if parameters
    ]


def single_drop(optimizer: torch.optim.Optimizer, steps: int, warmup: int, drop_at: float):
    """The paper's schedule: a linear warmup, then the learning rates, and from a share of the training on a tenth.

    Args:
        steps: of the whole training.
        warmup: steps of the warmup.
        drop_at: share of the training after which the rates are divided by ten.
    """
    drop = round(drop_at * steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)) * (0.1 if step >= drop else 1.0)
    )


def keeps_running_statistics(model: torch.nn.Module) -> bool:
    """Whether a module keeps statistics of its batches, which processes must then share.

    DETR's frozen batch norm keeps none, although it holds buffers.
    """
    kinds = torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm
    return any(isinstance(module, kinds) for module in model.modules())
