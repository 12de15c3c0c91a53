"""Building models by name, checking their image size, and counting their cost."""

import copy
import textwrap
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qtvit.errors import unknown_name
from qtvit.ops import KERNELS

from .qtvit import QTViT

ABLATION_KERNELS = "table3_"
"""Prefix of the names of kernels that exist only within the ablation of the paper's Table 3."""


def build_model(name: str, **model_args: Any) -> nn.Module:
    """``timm.create_model`` with one-line errors, for our models and timm's.

    Raises:
        ValueError: there is no such model, or it cannot be built with these arguments.
    """
    if not timm.is_model(name):
        raise unknown_name("model", name, [*timm.list_models("qtvit*"), *timm.list_models(exclude_filters="qtvit*")])
    kernel = str(model_args.get("kernel", ""))
    if kernel.startswith(ABLATION_KERNELS) and kernel not in KERNELS:
        raise ValueError(
            f"kernel {kernel!r} of an ablation is known only within qtvit.ablation.table3.table3_kernels()"
        )
    try:
        return timm.create_model(name, **model_args)
    except (TypeError, AssertionError, RuntimeError) as error:  # RuntimeError: weights that do not fit
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise ValueError(f"model {name} cannot be built with {model_args}: {reason}") from error


@torch.no_grad()
def check_img_size(model: nn.Module, img_size: tuple[int, int], option: str = "--img-size") -> None:
    """Raise a ValueError that names ``option`` unless ``model`` takes images of ``img_size`` (H, W).

    Ours take any size from their largest stride on; other models are tried on one blank image.
    """
    size = "x".join(map(str, img_size))
    if isinstance(model, QTViT):
        smallest = model.feature_info[-1]["reduction"]
        if min(img_size) < smallest:
            raise ValueError(f"{option} {size} is below the network's minimum of {smallest} px, its largest stride")
        return
    training = model.training
    try:
        model.eval()(torch.zeros(1, getattr(model, "in_chans", 3), *img_size).to(next(model.parameters())))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{option} {size} does not fit {type(model).__name__}: {error}") from error
    finally:
        model.train(training)


@dataclass(frozen=True)
class ModelCost:
    """Size of a model and cost of its forward pass for one image.

    Attributes:
        num_params: number of parameters.
        num_macs: multiply-accumulates of convolutions, linear layers and matrix products.
    """

    num_params: int
    num_macs: int


def model_cost(model: nn.Module, img_size: tuple[int, int]) -> ModelCost:
    """Parameters and MACs for one image of ``img_size`` (H, W), counted on a copy on the meta device."""
    shapes = copy.deepcopy(model).eval().to("meta")
    in_chans = getattr(model, "in_chans", 3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, in_chans, *img_size, device="meta"))
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)  # a MAC is 2 FLOPs
