import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qtvit.tasks.segment.sliding import sliding_window

NUM_CLASSES = 7


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 97, 211)


@pytest.fixture
def pointwise() -> nn.Module:
    """A network that sees one pixel: where windows lie makes no difference to it."""
    return nn.Conv2d(3, NUM_CLASSES, 1).requires_grad_(False)


def whole(run: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    scores, labels = run(image[None])[0].softmax(0).max(0)
    return labels, scores


@pytest.mark.parametrize("window", [(97, 211), (97, 64), (40, 211), (33, 48), (200, 50), (7, 9)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
def test_no_seams(image: Tensor, pointwise: nn.Module, window: tuple[int, int], overlap: float) -> None:
    labels, scores = sliding_window(pointwise, image, NUM_CLASSES, window, overlap=overlap)
    expected_labels, expected_scores = whole(pointwise, image)
    assert (labels.dtype, scores.dtype) == (torch.uint8, torch.float32)
    assert (labels == expected_labels).float().mean() > 0.999  # but for ties, to rounding
    assert torch.allclose(scores, expected_scores, atol=1e-5)


def test_one_window_is_the_whole_image(image: Tensor) -> None:
    torch.manual_seed(1)
    run = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, NUM_CLASSES, 3, 2, 1)).requires_grad_(False)
    sizes = []
    labels, scores = sliding_window(lambda x: sizes.append(x.shape) or run(x), image, NUM_CLASSES, (512, 512))
    assert sizes == [(1, 3, 97, 211)]
    logits = F.interpolate(run(image[None]), (97, 211), mode="bilinear")[0]
    assert (labels == logits.argmax(0)).float().mean() > 0.999
    assert torch.allclose(scores, logits.softmax(0).amax(0), atol=1e-5)


def test_a_constant_stays_one(image: Tensor) -> None:
    logits = torch.tensor([0.1, 2.0, -1.0])[None, :, None, None]
    labels, scores = sliding_window(lambda x: logits.expand(len(x), 3, 8, 8), image, 3, (32, 48), overlap=0.4)
    assert (labels == 1).all()
    assert torch.allclose(scores, logits.softmax(1).max().expand(97, 211))


def test_weights_fall_to_the_edges() -> None:
    """Two windows of 6 pixels on 8: the four that both see are blended by tents 0.5 1.5 2.5 2.5 1.5 0.5."""
    image = torch.arange(8.0).expand(3, 2, 8)

    def run(windows: Tensor) -> Tensor:
        first = (windows[:, :1, :, :1] == 0).float().expand(-1, 1, 2, 6)  # logit 1 in the first window, 0 in the second
        return torch.cat([first, torch.zeros_like(first)], 1)

    _, scores = sliding_window(run, image, 2, (2, 6), overlap=0.5)
    logits = torch.tensor([1, 1, 2.5 / 3, 2.5 / 4, 1.5 / 4, 0.5 / 3, 0, 0])
    assert torch.allclose(scores[0], torch.stack([logits, 0 * logits]).softmax(0).amax(0), atol=1e-6)


def test_windows_stay_within_the_image(image: Tensor) -> None:
    shapes = []

    def run(windows: Tensor) -> Tensor:
        shapes.append(tuple(windows.shape))
        assert torch.isin(windows, image).all()
        return torch.zeros(len(windows), 2, 1, 1)

    sliding_window(run, image, 2, (64, 64), overlap=0.25)
    assert shapes == 10 * [(1, 3, 64, 64)]  # five on 211 pixels, as four are 49 apart


def test_fixed_windows_are_padded(image: Tensor, pointwise: nn.Module) -> None:
    seen = []
    labels, _ = sliding_window(
        lambda x: seen.append(x) or pointwise(x), image, NUM_CLASSES, (128, 256), fixed_size=True
    )
    assert seen[0].shape == (1, 3, 128, 256)
    assert torch.equal(seen[0][0, :, :97, :211], image)
    assert (seen[0][0, :, 97:] == 0).all()
    assert (labels == whole(pointwise, image)[0]).float().mean() > 0.999
    labels, _ = sliding_window(pointwise, image, NUM_CLASSES, (128, 100), fixed_size=True)
    assert labels.shape == (97, 211)
    assert (labels == whole(pointwise, image)[0]).float().mean() > 0.999


def test_many_classes(image: Tensor) -> None:
    labels, _ = sliding_window(
        lambda x: torch.eye(300)[[299]][:, :, None, None].expand(len(x), -1, 4, 4), image, 300, (64, 64)
    )
    assert labels.dtype == torch.int16
    assert (labels == 299).all()


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that an operation made."""

    num_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_values = max(self.num_values, result.untyped_storage().size() // 4)
        return result


@pytest.mark.parametrize("low_resolution", [False, True])
def test_memory_is_bounded(low_resolution: bool) -> None:
    num_classes, height, width, side = 100, 300, 400, 64
    network = nn.Conv2d(3, num_classes, 1).requires_grad_(False)
    image = torch.randn(3, height, width)
    with LargestTensor() as largest:
        sliding_window(
            lambda x: network(F.avg_pool2d(x, 4) if low_resolution else x),
            image,
            num_classes,
            (side, side),
            overlap=0.25,
        )
    overlapping = 20  # rows: 5 to 7 windows of 64 on 300 and 400 pixels, at least 16
    assert largest.num_values <= num_classes * max(side * side, overlapping * width)
    assert largest.num_values < num_classes * height * width / 10


def test_a_large_window_of_small_logits_is_bounded_too() -> None:
    logits = torch.randn(1, 40, 30, 40)
    with LargestTensor() as largest:
        sliding_window(lambda _: logits, torch.randn(3, 300, 400), 40, (300, 400))
    assert largest.num_values < 40 * 300 * 400 / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "the overlap of windows must be from 0 to below 1, got 1.0"),
        ({"overlap": -0.1}, "the overlap of windows must be from 0 to below 1, got -0.1"),
        ({"window": (0, 64)}, "a window must have 1 x 1 pixels or more, got 0 x 64"),
        ({"num_classes": 8}, r"expected logits of shape \(1, 8, h, w\), got \(1, 7, 64, 64\)"),
    ],
)
def test_what_is_not_possible(image: Tensor, pointwise: nn.Module, options: dict, message: str) -> None:
    arguments = {"run": pointwise, "image": image, "num_classes": NUM_CLASSES, "window": (64, 64), **options}
    with pytest.raises(ValueError, match=message):
        sliding_window(**arguments)
