"""The attention as the release writes it."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from qtvit.bench.released import as_released


@pytest.mark.parametrize("name", ["qtvit_nano", "qtvit_0"])
@torch.no_grad()
def test_outputs_are_those_of_ours(name: str, randomize: Callable[[nn.Module, int], nn.Module]) -> None:
    model = randomize(timm.create_model(name, num_classes=5), 0).eval()
    pixels = torch.randn(2, 3, 64, 96)
    want = model(pixels)
    torch.testing.assert_close(as_released(model)(pixels), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_what_the_release_has_not() -> None:
    with pytest.raises(ValueError, match="kernel taylor2"):
        as_released(timm.create_model("qtvit_nano", kernel="relu"))
    with pytest.raises(ValueError, match="no attention of ours"):
        as_released(timm.create_model("resnet10t"))
