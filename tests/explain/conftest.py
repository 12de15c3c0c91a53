from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from qtvit.models import Architecture, QTViT


@pytest.fixture(scope="session")
def network(
    tiny_architectures: Mapping[str, Architecture], randomize: Callable[[nn.Module, int], nn.Module]
) -> Callable[..., QTViT]:
    """Builds the shrunken nano for 16 px with weights that matter; its attention layers have strides of 2 and 4."""

    def build(**args: Any) -> QTViT:
        return randomize(QTViT(tiny_architectures["nano"], num_classes=3, img_size=16, **args), 0).eval()

    return build


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """Noise, 100 pixels wide and 40 high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8))
