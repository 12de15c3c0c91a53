"""Building models by name, and what they cost."""

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
"""What the names of kernels begin with that only an ablation knows."""


def build_model(name: str, **model_args: Any) -> nn.Module:
    """``timm.create_model`` with one-line errors: any of our models or timm's, arguments as for timm.

    Raises:
        ValueError: there is no such model, or it does not take these arguments.
    """
    if not timm.is_model(name):
        raise unknown_name("model", name, [*timm.list_models("qtvit*"), *timm.list_models(exclude_filters="qtvit*")])
    kernel = str(model_args.get("kernel", ""))
    if kernel.startswith(ABLATION_KERNELS) and kernel not in KERNELS:
        raise ValueError(
            f"kernel {kernel!r} of an ablation is known only within qtvit.training.table3.table3_kernels()"
        )
    try:
        return timm.create_model(name, **model_args)
    except (TypeError, AssertionError, RuntimeError) as error:  # the latter for weights that do not fit
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise ValueError(f"model {name} cannot be built with {model_args}: {reason}") from error


@torch.no_grad()
def check_img_size(model: nn.Module, img_size: tuple[int, int], option: str = "--img-size") -> None:
    """ValueError that names ``option`` unless ``model`` takes images of ``img_size`` (H, W).

    Tried out on one image, but for our own models.
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
