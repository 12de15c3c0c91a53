import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import center_crop

from qtvit.data import Preprocess

ONE_LEVEL = 1 / 255 / 0.224


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (64, 64), (31, 200), (101, 202)])
@pytest.mark.parametrize("crop_pct", [0.95, 1.0])
def test_square_sizes_follow_the_published_protocol(shape: tuple[int, int], crop_pct: float) -> None:
    image = noise(*shape)
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
    # PIL takes a box in single precision, so that here and there a value is rounded the other way.
    torch.testing.assert_close(preprocess.transform()(image), published(image), atol=1.01 * ONE_LEVEL, rtol=0)


def resize_all_then_crop(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """The slow, obvious way, columns before rows."""
    height, width = preprocess.size
    cover = [int(np.ceil(side / preprocess.crop_pct)) for side in preprocess.size]
    scale = max(cover[0] / image.height, cover[1] / image.width)
    full = [max(cover[0], int(scale * image.height + 1e-6)), max(cover[1], int(scale * image.width + 1e-6))]
    mode = Image.Resampling[preprocess.interpolation.upper()]
    resized = image.resize((full[1], image.height), mode).resize((full[1], full[0]), mode)
    return np.asarray(center_crop(resized, [height, width])).astype(int)


@pytest.mark.parametrize("shape", [(50, 70), (300, 50), (8, 3140), (3000, 7), (1, 1), (37, 41), (500, 333)])
@pytest.mark.parametrize("size", [(64, 64), (33, 20), (40, 96)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
# Box and nearest jump between pixels, so that a hair's breadth decides which one they take; these do not.
@pytest.mark.parametrize("interpolation", ["bilinear", "hamming", "bicubic", "lanczos"])
def test_resizing_the_crop_alone_gives_the_same_pixels(
    shape: tuple[int, int], size: tuple[int, int], crop_pct: float, interpolation: str
) -> None:
    image = noise(*shape)
    preprocess = Preprocess(size, crop_pct, interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    out = (255 * preprocess.transform()(image)).round().int().permute(1, 2, 0).numpy()
    off = np.abs(out - resize_all_then_crop(image, preprocess))
    assert off.max() <= 2  # either pass rounds
    assert (off > 1).mean() < 1e-3
    assert off.mean() < 0.1


@pytest.mark.parametrize("interpolation", ["nearest", "box"])
def test_filters_that_jump(interpolation: str) -> None:
    preprocess = Preprocess((32, 32), 1.0, interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    image = noise(64, 96)
    out = (255 * preprocess.transform()(image)).round().int().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(out, resize_all_then_crop(image, preprocess))


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1), (2000, 30_000)])
def test_extreme_shapes_take_no_memory(shape: tuple[int, int]) -> None:
    """Resized as a whole, the first two would have 50 billion pixels."""
    grey = Image.new("RGB", (shape[1], shape[0]), (128, 128, 128))
    out = Preprocess((224, 224), mean=(0, 0, 0), std=(1, 1, 1)).transform()(grey)
    assert (out == 128 / 255).all()


def test_the_crop_is_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    out = Preprocess((50, 50), interpolation="box", mean=(0, 0, 0), std=(1, 1, 1)).transform()(image)
    assert (out == 1).all()


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (1, 1), (1000, 3)])
def test_rectangles_are_covered_without_distortion(shape: tuple[int, int]) -> None:
    preprocess = Preprocess((24, 48), mean=(0, 0, 0), std=(1, 1, 1))
    white = Image.new("RGB", (shape[1], shape[0]), "white")
    out = preprocess.transform()(white)
    assert out.shape == (3, 24, 48)
    assert (out == 1).all()  # no padding shows


def test_an_unknown_interpolation() -> None:
    with pytest.raises(ValueError, match="unknown interpolation 'bicubik'; did you mean bicubic"):
        Preprocess((24, 48), interpolation="bicubik").transform()
