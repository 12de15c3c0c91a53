"""Backbones of dense tasks: a classifier without its head, that yields the maps of its stages.

Shapes: B batch, C channels, H x W image or feature map.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qtvit.errors import some

from .build import build_model
from .foreign import fit_weights, kernel_mismatch
from .qtvit import ARCHITECTURES, QTViT


def build_backbone(model: str, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """A model of ours or timm's whose forward maps images to the list of its stages' feature maps, the finest first.

    It has timm's ``feature_info``. Ours keep their names, below "model.", and lay their positional maps out as the
    classifier does, by default for 224 px (32 px for the nano): so its weights fit as they are, the parameters are
    those of the paper's Tables 4 to 6, and images of any H x W get the maps resized.

    Args:
        model: name, as for ``timm.create_model``.
        model_args: arguments of the model; those of its classifier have no effect.

    Raises:
        ValueError: there is no such model, it does not take these arguments, or it has no feature maps.
    """
    ours = {"feature_cls": "getter"} if model.split(".")[0] in ARCHITECTURES else {}
    return build_model(model, **{**(model_args or {}), **ours, "features_only": True})


def load_backbone(backbone: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Fill a backbone with the weights of a whole classifier, whose head is left out.

    Weights of ours may have anybody's names, and positional maps of another size are resized
    (`qtvit.models.foreign.fit_weights`). Of other models, everything that the backbone has not is left out.

    Args:
        backbone: from `build_backbone`.
        state_dict: of a classifier of the same model, or the backbone's own.

    Raises:
        ValueError: they do not fit; nothing is loaded then.
    """
    network: nn.Module = getattr(backbone, "model", backbone)
    weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
    own = network.state_dict()
    if isinstance(network, QTViT):
        fitted = fit_weights(weights, network)
        if mismatch := kernel_mismatch(fitted, network.kernel):
            raise ValueError(mismatch)
        weights = {name: value for name, value in fitted.items() if not name.startswith("head.")}
    else:  # timm joins the first parts of names, as in stages_0.blocks.1
        given = {name.replace(".", "_"): value for name, value in weights.items()}
        weights = {name: given[name.replace(".", "_")] for name in own if name.replace(".", "_") in given}

    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not of this model" for name in weights if name not in own]
    wrong += [
        f"{name} has shape {(*weights[name].shape,)}, not {(*value.shape,)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"weights do not fit the backbone: {some(wrong, 3)}")
    network.load_state_dict(weights)


def below(prefix: str, groups: Any) -> Any:
    """A network's ``group_matcher`` for the names that its weights have in a larger one: behind ``prefix``."""
    if isinstance(groups, str):
        return re.sub(r"\^", "^" + re.escape(prefix), groups)
    if isinstance(groups, Mapping):
        return {name: below(prefix, pattern) for name, pattern in groups.items()}
    if isinstance(groups, (list, tuple)):
        return type(groups)(below(prefix, pattern) for pattern in groups)
    return groups
