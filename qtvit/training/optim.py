"""Which parameters are trained, by what optimiser, with what decay, and at which learning rate."""

import math
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import Muon, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from qtvit.models import QTViT

from .config import OptimConfig


def warmup_cosine(step: int, *, num_steps: int, num_warmup: int) -> float:
    """Factor of the peak learning rate: (step + 1) / num_warmup at first, then half a cosine to 0 at ``num_steps``."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - num_warmup) / max(num_steps - num_warmup, 1), 1)))


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters with and without decay; ours by ``QTViT.no_weight_decay``, timm's models by timm's rule.

    With ``layer_decay`` below 1, ``lr`` is multiplied by it once for every layer (as ``group_matcher`` counts them)
    that comes after the parameter's own; the last group is the head's.
    """
    ours = isinstance(model, QTViT)
    skip: Any = getattr(model, "no_weight_decay", set)
    if layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            weight_decay,
            no_weight_decay_list=skip(),
            weight_decay_exclude_1d=not ours,
            layer_decay=layer_decay,
        )
        return [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    if not ours:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skip())
    exempt = skip()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
    ]


def make_optimizer(model: nn.Module, lr: float, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of the trainable parameters of ``model``; see `OptimConfig`."""
    groups = parameter_groups(model, lr, config.weight_decay, config.layer_decay)
    if config.name == "muon":
        return Muon(groups, lr=lr, betas=config.betas, momentum=config.momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas)


def freeze(model: nn.Module, what: str | None) -> list[nn.Module]:
    """Take parameters out of training; the modules that hold nothing else, whose statistics have to stay too.

    Args:
        model: one of timm's, as its ``group_matcher`` tells the stages apart.
        what: "backbone" for all but the head, "stages=N" for the stem and the first N stages, or None.

    Raises:
        ValueError: the model has fewer stages, or does not tell.
    """
    if what is None:
        return []
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"--freeze {what}: {type(model).__name__} does not say what its stages are (no group_matcher)")
    layer_of = group_parameters(model, matcher(coarse=True), reverse=True)  # the stem is 0, the head last
    num_stages = max(layer_of.values()) - 1
    last = num_stages if what == "backbone" else int(what.removeprefix("stages="))
    if last > num_stages:
        raise ValueError(f"--freeze {what}: {type(model).__name__} has {num_stages} stages")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_of[name] > last)
    return [
        module
        for module in model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The BatchNorms of ``model`` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
