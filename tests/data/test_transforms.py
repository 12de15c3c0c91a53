import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from qtvit.data import Preprocess


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (64, 64), (31, 200), (101, 202)])
@pytest.mark.parametrize("crop_pct", [0.95, 1.0])
def test_square_sizes_follow_the_published_protocol(shape: tuple[int, int], crop_pct: float) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    preprocess = Preprocess((32, 32), crop_pct=crop_pct)
    resize = 34 if crop_pct == 0.95 else 32  # ceil(32 / 0.95)
    published = transforms.Compose(
        [
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.testing.assert_close(preprocess.transform()(image), published(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (1, 1), (1000, 3)])
def test_rectangles_are_covered_without_distortion(shape: tuple[int, int]) -> None:
    preprocess = Preprocess((24, 48), mean=(0, 0, 0), std=(1, 1, 1))
    white = Image.new("RGB", (shape[1], shape[0]), "white")
    out = preprocess.transform()(white)
    assert out.shape == (3, 24, 48)
    assert (out == 1).all()  # no padding shows
