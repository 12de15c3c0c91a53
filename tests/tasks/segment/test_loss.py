import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qtvit.tasks.segment.loss import SegmentationLoss, balanced_weights, dice_loss, hard_pixels

NUM_CLASSES = 4
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0])
LOSSES = {
    "cross-entropy": SegmentationLoss(),
    "weights": SegmentationLoss(class_weights=WEIGHTS),
    "ohem": SegmentationLoss(ohem=True, threshold=0.3, min_kept=20),
    "ohem, all kept": SegmentationLoss(ohem=True, min_kept=10**6),
    "ohem, weights": SegmentationLoss(class_weights=WEIGHTS, ohem=True, min_kept=30),
    "dice": SegmentationLoss(dice_weight=2.0),
}


def logits_of(probabilities: list[list[float]]) -> Tensor:
    """(1, C, 1, pixels) logits of these probabilities of the classes of each pixel."""
    return torch.tensor(probabilities).log().T[None, :, None]


@pytest.fixture
def logits() -> Tensor:
    return (3 * torch.randn(2, NUM_CLASSES, 9, 13)).requires_grad_()


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, NUM_CLASSES, (2, 9, 13))
    labels[:, 2:5, 3:] = 255
    return labels


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_never_count(name: str, logits: Tensor, labels: Tensor) -> None:
    loss = LOSSES[name](logits, labels)
    assert loss > 0
    (gradient,) = torch.autograd.grad(loss, logits)
    ignored = (labels == 255)[:, None].expand_as(gradient)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()
    changed = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    assert torch.equal(LOSSES[name](changed, labels), loss)
    assert not torch.equal(LOSSES[name](logits + torch.randn_like(logits), labels), loss)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_labelled(name: str, logits: Tensor, labels: Tensor) -> None:
    loss = LOSSES[name](logits, torch.full_like(labels, 255))
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_any_precision_and_size(name: str, logits: Tensor, labels: Tensor) -> None:
    small = (30 * logits.detach()[:, :, ::2, ::3]).bfloat16().requires_grad_()
    loss = LOSSES[name](small, labels)
    assert loss.dtype == torch.float32
    resized = F.interpolate(small.float(), (9, 13), mode="bilinear", align_corners=False)
    assert torch.equal(loss, LOSSES[name](resized, labels))
    (gradient,) = torch.autograd.grad(loss, small)
    assert gradient.isfinite().all()


def test_cross_entropy_by_hand() -> None:
    logits = logits_of([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    labels = torch.tensor([[[0, 1, 255]]])
    expected = -(math.log(0.5) + math.log(0.75)) / 2
    assert float(SegmentationLoss()(logits, labels)) == pytest.approx(expected, rel=1e-5)
    weights = torch.tensor([3.0, 1.0])
    expected = -(3 * math.log(0.5) + math.log(0.75)) / 4
    assert float(SegmentationLoss(class_weights=weights)(logits, labels)) == pytest.approx(expected, rel=1e-5)
    other = torch.tensor([[[0, 1, -1]]])
    assert torch.equal(SegmentationLoss(-1)(logits, other), SegmentationLoss()(logits, labels))


@pytest.mark.parametrize(
    ("threshold", "min_kept", "kept"),
    [
        (0.7, 1, [1, 1, 1, 0, 0, 0]),  # all below the threshold, more than the one that has to be kept
        (0.45, 1, [1, 1, 0, 0, 0, 0]),
        (0.45, 3, [1, 1, 1, 0, 0, 0]),  # the third hardest is above it
        (0.1, 1, [1, 0, 0, 0, 0, 0]),
        (0.45, 4, [1, 1, 1, 1, 1, 0]),  # the fourth is as hard as the fifth
        (0.45, 99, [1, 1, 1, 1, 1, 0]),  # all that are labelled
    ],
)
def test_hard_pixels(threshold: float, min_kept: int, kept: list[int]) -> None:
    own = [0.2, 0.4, 0.6, 0.8, 0.8, 0.1]
    logits = logits_of([[p, 1 - p] for p in own])
    labels = torch.tensor([[[0, 0, 0, 0, 0, 255]]])
    assert hard_pixels(logits, labels, 255, threshold, min_kept).flatten().tolist() == [bool(k) for k in kept]
    loss = SegmentationLoss(ohem=True, threshold=threshold, min_kept=min_kept)(logits, labels)
    losses = [-math.log(p) for p, k in zip(own, kept, strict=True) if k]
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_hard_pixels_are_drawn_from_the_whole_batch() -> None:
    logits = torch.cat([logits_of([[p, 1 - p] for p in row]) for row in ([0.8, 0.9, 0.95], [0.81, 0.82, 0.83])])
    hard = hard_pixels(logits, torch.zeros(2, 1, 3, dtype=torch.long), 255, 0.5, 2)
    assert hard[:, 0].tolist() == [[True, False, False], [True, True, True]]


def test_dice_by_hand() -> None:
    logits = logits_of([[0.5, 0.3, 0.2], [0.25, 0.7, 0.05], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])
    labels = torch.tensor([[[0, 1, 255, 0]]])
    first = 2 * (0.5 + 0.6) / ((0.5 + 0.25 + 0.6) + 2)
    second = 2 * 0.7 / ((0.3 + 0.7 + 0.2) + 1)
    expected = 1 - (first + second) / 2  # the third class has no pixel
    assert float(dice_loss(logits, labels, 255)) == pytest.approx(expected, rel=1e-5)
    both = SegmentationLoss(dice_weight=0.5)(logits, labels)
    assert float(both) == pytest.approx(float(SegmentationLoss()(logits, labels)) + 0.5 * expected, rel=1e-5)


def test_dice_of_a_perfect_prediction() -> None:
    labels = torch.randint(0, 3, (2, 5, 5))
    logits = 50 * F.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    assert float(dice_loss(logits, labels, 255)) == pytest.approx(0, abs=1e-6)


def test_balanced_weights() -> None:
    weights = balanced_weights(torch.tensor([10, 30, 0]))
    assert weights.tolist() == pytest.approx([40 / 20, 40 / 60, 0])
    assert balanced_weights(torch.tensor([0, 0])).tolist() == [0, 0]
    assert balanced_weights(torch.tensor([3 * 10**9, 10**9])).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_weights": torch.tensor([1.0, -1.0])},
            r"class weights must be finite and not negative, got \[1.0, -1.0\]",
        ),
        ({"threshold": 0}, "the threshold of OHEM is a probability above 0, got 0"),
        ({"threshold": 1.5}, "the threshold of OHEM is a probability above 0, got 1.5"),
        ({"min_kept": 0}, "OHEM keeps 1 pixel of an image or more, got 0"),
        ({"dice_weight": -1.0}, "the weight of the Dice loss must be finite and not negative, got -1.0"),
    ],
)
def test_what_is_not_possible(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**options)
