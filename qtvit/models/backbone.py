"""Backbones of dense tasks: a classifier without its head, that yields the maps of its stages.

Shapes: B batch, C channels, H x W image or feature map.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qtvit.errors import some

from .foreign import fit_weights, kernel_mismatch
from .qtvit import QTViT


class Backbone(nn.Module):
    """A classifier without what stands behind its last map: (B, 3, H, W) -> maps of its stages, the finest first.

    Ours lay their positional maps out as the classifier does, by default for 224 px (32 px for the nano): so its
    weights fit as they are, the parameters are those of the paper's Tables 4 to 6, and images of any H x W get the
    maps resized.

    Args:
        body: a network of ours or timm's with ``forward_intermediates``; what it does not need is taken out of it.
        num_maps: how many maps, the last ones; None: all.
        full_resolution: whether a map of stride 1, as `qtvit_nano` has one, is among them; otherwise it is so only if
            there are fewer than two others, as much of a head on it would take much time for little.

    Attributes:
        channels: of the maps.
        strides: of the maps.
        removed: top-level parts of the network that are taken out.

    Raises:
        ValueError: the network gives no maps.
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
    """Of the maps of all stages; ValueError if it has no ``forward_intermediates`` that gives them."""
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{type(network).__name__} gives no feature maps (no forward_intermediates)")
    feature_info: Any = network.feature_info
    return [stage["reduction"] for stage in feature_info]


def _parts(network: nn.Module) -> set[str]:
    """Top-level modules and parameters that have weights."""
    return {name.split(".")[0] for name in network.state_dict()}


def load_backbone(backbone: Backbone, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Fill a backbone with the weights of a classifier: ours under anybody's names, or timm's.

    Positional maps of another size than its own are resized (`qtvit.models.foreign.fit_weights`).

    Returns:
        The names of the weights it has no place for: those behind its last feature map.

    Raises:
        ValueError: weights are missing, of another shape, or of no part of such a classifier; nothing is loaded then.
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


def below(prefix: str, groups: Any) -> Any:
    """A network's ``group_matcher`` for the names that its weights have in a larger one: behind ``prefix``."""
    if isinstance(groups, str):
        return re.sub(r"\^", "^" + re.escape(prefix), groups)
    if isinstance(groups, Mapping):
        return {name: below(prefix, pattern) for name, pattern in groups.items()}
    if isinstance(groups, (list, tuple)):
        return type(groups)(below(prefix, pattern) for pattern in groups)
    return groups
