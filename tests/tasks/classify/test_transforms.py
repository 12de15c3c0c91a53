import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, RandAugment
from torch import Tensor
from torchvision.transforms import functional as tvf

from qtvit.data.sampling import seed_everywhere
from qtvit.tasks.classify.transforms import TrainTransform

PLAIN: dict[str, Any] = {"scale": (1, 1), "ratio": (1, 1), "hflip": 0, "interpolation": "bicubic"}
"""Of a square image this keeps everything."""
UNIT: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
PUBLISHED = "rand-n2-m6-mstd1.0-inc1"


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(image: Image.Image, size: int) -> Tensor:
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return tvf.normalize(tvf.to_tensor(resized), list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def operations(transform: TrainTransform) -> dict[str, AugmentOp]:
    augment = next(step for step in transform.augment.transforms if isinstance(step, RandAugment))
    return {op.name: op for op in augment.ops}


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vflip": 0.5, "color_jitter": 0.3},
        {"auto_augment": PUBLISHED, "color_jitter": 0.3},
        {"auto_augment": "rand-m9-p0.9-mstd101-mmax12-tweights", "random_erasing": 0.5},
        {"auto_augment": "augmix-m5-w2-d1-a1.5-b1-mstd0.5"},
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "originalr"},
        {"auto_augment": "v0r"},
        {"auto_augment": "3a", "color_jitter": 0.3},
        {"auto_augment": "rand-m6-t3aw", "mean": (1, 0.5, 0.1), "std": (0.5, 0.25, 0.2)},
        {"scale": (0.2, 0.6), "ratio": (0.5, 2), "hflip": 1, "random_erasing": 1},
    ],
    ids=lambda options: options.get("auto_augment", "-".join(options)),
)
def test_bit_equal_to_timm_where_both_mean_the_same(size: tuple[int, int], options: dict[str, Any]) -> None:
    ours = TrainTransform(size, interpolation="bicubic", **options)
    erasing = {"re_prob": options.get("random_erasing", 0)}
    shared = {"color_jitter": 0.0, **{name: value for name, value in options.items() if name != "random_erasing"}}
    peer = create_transform((3, *size), is_training=True, interpolation="bicubic", **erasing, **shared)
    for number in range(25):
        image = noise(40, 60, seed=number)
        seed_everywhere(number)
        expected = peer(image)
        seed_everywhere(number)
        result = ours(image)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "box", "hamming", "lanczos"])
def test_other_interpolations_are_timms(interpolation: str) -> None:
    seed_everywhere(1)
    expected = create_transform(32, is_training=True, interpolation=interpolation, color_jitter=0)(noise(40, 60))
    seed_everywhere(1)
    assert torch.equal(TrainTransform((32, 32), interpolation=interpolation)(noise(40, 60)), expected)


def test_random_interpolation_is_one_of_six_with_equal_odds() -> None:
    image = noise(20, 20)
    names = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
    results = {name: TrainTransform((9, 9), **PLAIN | {"interpolation": name})(image) for name in names}
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results.values(), 2))
    transform = TrainTransform((9, 9), **PLAIN | {"interpolation": "random"})
    seed_everywhere(0)
    drawn = []
    for _ in range(600):
        result = transform(image)
        drawn += [name for name in names if torch.equal(results[name], result)]
    counts = {name: drawn.count(name) for name in names}
    assert sum(counts.values()) == 600
    assert all(70 <= count <= 130 for count in counts.values()), counts  # three standard deviations


@pytest.mark.parametrize("interpolation", ["random", "nearest", "bicubic"])
def test_rand_augment_fills_with_the_mean_colour_and_is_always_bicubic(interpolation: str) -> None:
    transform = TrainTransform((32, 32), auto_augment=PUBLISHED, interpolation=interpolation)
    for op in operations(transform).values():
        assert op.kwargs == {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
    white = TrainTransform((32, 32), auto_augment="rand-m3", mean=(1.1, 1, 0.5))
    assert operations(white)["Rotate"].kwargs["fillcolor"] == (255, 255, 128)


@pytest.mark.parametrize("text", ["rand-n1-m10-p1-inc1", "rand-n1-m0-p1", "v0", "v0r", "augmix-m10-d1-mstd0"])
def test_no_bits_left_is_black(text: str) -> None:
    augment = TrainTransform((8, 8), auto_augment=text).augment.transforms[-1]
    ops = augment.ops if hasattr(augment, "ops") else [op for pair in augment.policy for op in pair]
    posterize = [op for op in ops if op.name.startswith("Posterize")]
    assert posterize
    for op in posterize:
        for bits in range(9):
            expected = np.asarray(noise(8, 8)) >> (8 - bits) << (8 - bits)
            np.testing.assert_array_equal(op.aug_fn(noise(8, 8), bits, **op.kwargs), expected)


@pytest.mark.parametrize(("name", "pixels"), [("TranslateXRel", 27), ("TranslateYRel", 9)])
def test_shifts_of_a_rectangle(monkeypatch: pytest.MonkeyPatch, name: str, pixels: int) -> None:
    """Magnitude 10 of 10 is 0.45 of the side: 27 of 60 columns, 9 of 20 rows; the mean colour comes in."""
    transform = TrainTransform((20, 60), auto_augment="rand-n1-m10-p1", interpolation="bicubic")
    monkeypatch.setattr(np.random, "choice", lambda ops, *_, **__: [op for op in ops if op.name == name])
    monkeypatch.setattr(random, "random", lambda: 0.9)  # > 0.5 is to the lower right
    image = noise(20, 60)
    shifted = np.asarray(transform.augment.transforms[-1](image))
    expected = np.full((20, 60, 3), (124, 116, 104), dtype=np.uint8)
    columns, rows = (pixels, 0) if name == "TranslateXRel" else (0, pixels)
    expected[rows:, columns:] = np.asarray(image)[: 20 - rows, : 60 - columns]
    np.testing.assert_array_equal(shifted, expected)


def test_erased_is_zero_after_normalisation() -> None:
    image = Image.new("RGB", (32, 32), (255, 0, 255))
    erased = 0
    for number in range(20):
        seed_everywhere(number)
        result = TrainTransform((32, 32), random_erasing=1, **PLAIN)(image)
        zero = (result == 0).all(0)
        assert torch.equal(result, torch.where(zero, 0, plain(image, 32)))
        rows, columns = zero.any(1).sum(), zero.any(0).sum()
        assert zero.sum() == rows * columns  # one rectangle
        erased += int(zero.any())
    assert erased == 20


def test_with_everything_off_the_image_is_resized_and_normalised() -> None:
    image = noise(40, 40)
    transform = TrainTransform((32, 32), **PLAIN)
    assert torch.equal(transform(image), plain(image, 32))


@pytest.mark.parametrize(
    "part",
    [
        {"scale": (0.3, 0.5)},
        {"ratio": (2, 2)},
        {"hflip": 1},
        {"vflip": 1},
        {"color_jitter": 0.5},
        {"auto_augment": "rand-n2-m9-p1"},
        {"interpolation": "random"},
        {"random_erasing": 1},
    ],
    ids=lambda part: next(iter(part)),
)
def test_each_part_alone_changes_the_image(part: dict[str, Any]) -> None:
    image = noise(40, 40)
    seed_everywhere(3)
    result = TrainTransform((32, 32), **PLAIN | part)(image)
    assert result.shape == (3, 32, 32)
    assert not torch.equal(result, plain(image, 32))


def test_flips_by_hand() -> None:
    image = noise(32, 32)
    straight = TrainTransform((32, 32), **PLAIN)(image)
    assert torch.equal(TrainTransform((32, 32), **PLAIN | {"hflip": 1})(image), straight.flip(2))
    assert torch.equal(TrainTransform((32, 32), **PLAIN | {"vflip": 1})(image), straight.flip(1))


def test_the_source_image_stays_as_it_is() -> None:
    image = noise(32, 32)
    before = image.tobytes()
    TrainTransform((32, 32), random_erasing=1, **PLAIN)(image)
    assert image.tobytes() == before


def test_the_global_generators_determine_the_result() -> None:
    transform = TrainTransform((24, 32), auto_augment=PUBLISHED, random_erasing=0.5)
    results = []
    for seed in (1, 2, 1):
        seed_everywhere(seed)
        results.append(torch.stack([transform(noise(40, 60)) for _ in range(8)]))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rand-x5",
        "rand-foo",
        "rand-tweight",
        "rand-weights",
        "rand-m",
        "rand-m1.5",
        "rnd-m3",
        "augmix-q1",
        "v1",
        "v0-m3",
        "rand-",
    ],
)
def test_strings_that_are_not_timms(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--augment\.auto-augment '.*' is not one of timm's") as error:
        TrainTransform((32, 32), auto_augment=text)
    assert repr(text) in str(error.value)


def test_an_unknown_interpolation() -> None:
    with pytest.raises(ValueError, match="unknown interpolation 'bicubik'; did you mean bicubic"):
        TrainTransform((32, 32), interpolation="bicubik")
