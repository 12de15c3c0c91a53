"""Backbones for dense prediction: a classifier without its head, which returns the feature maps of its stages.

Shapes: B batch, C channels, H x W image or feature map.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtvit.errors import some

from .foreign import fit_weights, kernel_mismatch
from .qtvit import QTViT

BODY = "backbone.body."
"""What the names of a network's parameters begin with in a model on a `Backbone`."""


class Backbone(nn.Module):
    """A classifier without its head: (B, 3, H, W) -> feature maps of its stages, the finest first.

    The positional maps of our networks keep the classifier's size, by default that for 224 px (32 px for the nano). So
    the classifier's weights fit unchanged and the parameter counts are those of the paper's Tables 4 to 6; for images
    of other sizes, the forward pass resizes the maps.

    Args:
        body: a network with timm's ``forward_intermediates``, ours or timm's; layers that the chosen feature maps do
            not need are removed from it in place.
        num_maps: number of feature maps, taken from the coarsest end; None: all.
        full_resolution: whether to include a map of stride 1, which `qtvit_nano` has. If not, it is included only where
            there are fewer than two others, because a head at full resolution takes much time for little gain.

    Attributes:
        indices: stages that the feature maps come from.
        channels: channels of each feature map.
        strides: stride of each feature map in px.
        removed: top-level names of the modules and parameters that were removed from ``body``.

    Raises:
        ValueError: the network has no ``forward_intermediates``.
    """

    def __init__(self, body: nn.Module, num_maps: int | None = None, *, full_resolution: bool = False) -> None:
        super().__init__()
        network: Any = body
        strides = strides_of(body)
        full = 0 if full_resolution else strides.count(1)
        first = full if len(strides) - full > 1 else 0
        self.indices = list(range(first, len(strides)))[-(num_maps or len(strides)) :]
        self.strides = [strides[i] for i in self.indices]
        self.channels: list[int] = [network.feature_info[i]["num_chs"] for i in self.indices]
        self.body = body
        parts = _parts(body)
        network.prune_intermediate_layers(self.indices, prune_norm=True)
        self.removed = parts - _parts(body)

    def forward(self, x: Tensor) -> Any:
        network: Any = self.body
        return network.forward_intermediates(x, self.indices, output_fmt="NCHW", intermediates_only=True)


def strides_of(network: nn.Module) -> list[int]:
    """The strides of the feature maps of all stages; ValueError if there is no ``forward_intermediates``."""
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{type(network).__name__} gives no feature maps (no forward_intermediates)")
    feature_info: Any = network.feature_info
    return [stage["reduction"] for stage in feature_info]


def _parts(network: nn.Module) -> set[str]:
    """Top-level names in the state dict of ``network``."""
    return {name.split(".")[0] for name in network.state_dict()}


def load_backbone(backbone: Backbone, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Load the weights of a classifier into a backbone.

    Weights of our networks may have any of the names that `qtvit.models.foreign.fit_weights` knows, and positional maps
    of another size are resized. Weights of timm's networks need timm's names.

    Returns:
        Names of the weights that were not loaded because they belong to removed parts, such as the head.

    Raises:
        ValueError: weights are missing, have another shape, belong to another kernel or to no part of such a
            classifier; nothing is loaded then.
    """
    body: Any = backbone.body
    own = body.state_dict()
    given = fit_weights(state_dict, own, body.cfg, body.kernel) if isinstance(body, QTViT) else dict(state_dict)
    if isinstance(body, QTViT) and (mismatch := kernel_mismatch(given, body.kernel)):
        raise ValueError(mismatch)
    dropped = [name for name in given if name.split(".")[0] in backbone.removed]
    weights = {name: tensor for name, tensor in given.items() if name not in set(dropped)}
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not of this model" for name in weights if name not in own]
    wrong += [
        f"{name} has shape {(*weights[name].shape,)}, not {(*value.shape,)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"these are no weights of this {type(body).__name__}: {some(wrong, 3)}")
    body.load_state_dict(weights)
    return dropped


class OnBackbone:
    """What timm asks of a model, for one that has a `Backbone` in ``backbone``: answered by the network in that."""

    backbone: Any

    @property
    def body(self) -> Any:
        """The network in the backbone."""
        return self.backbone.body

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters that the network's own recipe exempts from weight decay."""
        return {BODY + name for name in getattr(self.body, "no_weight_decay", set)()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.body.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups of the network; everything on top of it matches none of them and so comes last."""
        return _below(BODY, self.body.group_matcher(coarse=coarse))


def _below(prefix: str, groups: Any) -> Any:
    """Adapt a network's ``group_matcher`` patterns to a larger model that holds the network under ``prefix``."""
    if isinstance(groups, str):
        return re.sub(r"\^", "^" + re.escape(prefix), groups)
    if isinstance(groups, Mapping):
        return {name: _below(prefix, pattern) for name, pattern in groups.items()}
    if isinstance(groups, (list, tuple)):
        return type(groups)(_below(prefix, pattern) for pattern in groups)
    return groups
