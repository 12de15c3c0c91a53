"""Building models by name, and what they cost."""

import copy
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qtvit.errors import unknown_name


def build_model(name: str, **model_args: Any) -> nn.Module:
    """``timm.create_model`` with one-line errors: any of our models or timm's, arguments as for timm.

    Raises:
        ValueError: there is no such model, or it does not take these arguments.
    """
    if not timm.is_model(name):
        raise unknown_name("model", name, [*timm.list_models("qtvit*"), *timm.list_models(exclude_filters="qtvit*")])
    try:
        return timm.create_model(name, **model_args)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model {name} cannot be built with {model_args}: {error}") from error


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of one forward pass: multiply-accumulates of convolutions, linear layers and matrix products."""

    num_params: int
    num_macs: int


def model_cost(model: nn.Module, img_size: tuple[int, int]) -> ModelCost:
    """Parameters and MACs for one image of ``img_size`` (H, W), counted on shapes alone; the model is left as it is."""
    shapes = copy.deepcopy(model).eval().to("meta")
    in_chans = getattr(model, "in_chans", 3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, in_chans, *img_size, device="meta"))
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
