"""Mixed batches, against pixels and targets computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from qtvit.tasks.classify import mixing
from qtvit.tasks.classify.mixing import blend, mix, paste, soft_targets


def batch(num: int = 4, height: int = 6, width: int = 8) -> tuple[Tensor, Tensor]:
    """Image i is i everywhere, and of class i."""
    return torch.arange(num).float()[:, None, None, None].expand(num, 3, height, width).clone(), torch.eye(num)


def test_soft_targets() -> None:
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    assert targets.dtype == torch.float32
    assert torch.equal(soft_targets(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


def test_blend() -> None:
    images, targets = blend(*batch(3), 0.75)
    assert images[:, 0, 0, 0].tolist() == [0.5, 1.0, 1.5]  # 3/4 · i + 1/4 · (2 - i)
    assert (images == images[:, :1, :1, :1]).all()
    assert targets.tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]]


def test_paste() -> None:
    # At lambda 3/4 half of each side: 3 x 4 of 6 x 8 pixels; half of 3 is rounded down to 1, so 2 x 4 unclipped.
    y, x = torch.tensor([2, 0, 5, 3]), torch.tensor([4, 0, 7, 6])
    images, targets = paste(*batch(4), 0.75, y, x)
    boxes = [(1, 3, 2, 6), (0, 1, 0, 2), (4, 6, 5, 8), (2, 4, 4, 8)]  # rows from, to; columns from, to
    for i, (top, bottom, left, right) in enumerate(boxes):
        want = torch.full((6, 8), float(i))
        want[top:bottom, left:right] = 3 - i
        assert torch.equal(images[i], want.expand(3, 6, 8)), i
    area = torch.tensor([8, 2, 6, 8]) / 48
    torch.testing.assert_close(targets, torch.diag(1 - area) + torch.diag(area).flip(1))


@pytest.mark.parametrize(("lam", "covered"), [(1.0, 0), (0.9999, 0), (0.0, 20 * 30)])
def test_paste_at_the_ends_of_lambda(lam: float, covered: int) -> None:
    images, targets = paste(*batch(2, 20, 30), lam, torch.tensor([10, 10]), torch.tensor([15, 15]))
    assert (images[0] == 1).sum() == 3 * covered
    assert targets[0, 1] == covered / 600


@pytest.mark.parametrize("num", [1, 2, 5, 16])
@pytest.mark.parametrize("size", [(7, 13), (32, 32), (1, 1)])
def test_targets_follow_the_covered_area_of_each_image(num: int, size: tuple[int, int]) -> None:
    clipped = 0
    for seed in range(30):
        torch.manual_seed(seed)
        images, targets = mix(*batch(num, *size), mixup=0.0, cutmix=1.0, alpha=1.0)
        for i in range(num):
            own = 1.0 if i == num - 1 - i else (images[i, 0] == i).float().mean().item()
            assert targets[i, i].item() == pytest.approx(own, abs=1e-6)
            assert targets[i].sum().item() == pytest.approx(1, abs=1e-6)
        clipped += len({round(value, 4) for value in targets.diagonal().tolist()}) > 1
    assert clipped > 5 or num < 5 or size == (1, 1)  # so images of one batch have boxes of their own


def test_the_odds() -> None:
    counts = {"none": 0, "mixup": 0, "cutmix": 0}
    arguments = batch(2, 16, 16)
    for _ in range(4000):
        images, _ = mix(*arguments, mixup=0.3, cutmix=0.5, alpha=8.0)
        values = images[0].unique()
        whole = torch.equal(images, arguments[0])
        counts["none" if whole else "cutmix" if values.frac().count_nonzero() == 0 else "mixup"] += 1
    assert [counts[name] / 4000 for name in ("none", "mixup", "cutmix")] == pytest.approx([0.2, 0.3, 0.5], abs=0.03)
    kinds = {mix(*arguments, mixup=0.5, cutmix=0.5, alpha=8.0)[0] is arguments[0] for _ in range(300)}
    assert kinds == {False}
    assert mix(*arguments, mixup=0.0, cutmix=0.0, alpha=1.0)[0] is arguments[0]


@pytest.mark.parametrize("alpha", [0.1, 0.4, 2.0])
def test_lambda_follows_the_beta_distribution(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(mixing, "blend", lambda images, targets, lam: drawn.append(lam))
    for _ in range(5000):
        mix(*batch(1, 1, 1), mixup=1.0, cutmix=0.0, alpha=alpha)
    lam = torch.tensor(drawn)
    assert 0 <= lam.min() <= lam.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    assert lam.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 5000))
    assert lam.var().item() == pytest.approx(variance, rel=0.06)


def test_each_image_draws_a_centre_of_its_own_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(mixing, "paste", lambda images, targets, lam, y, x: drawn.append(torch.stack([y, x])))
    for _ in range(500):
        mix(*batch(16, 3, 5), mixup=0.0, cutmix=1.0, alpha=1.0)
    y, x = torch.stack(drawn, 1).flatten(1)
    counts = torch.bincount(5 * y + x, minlength=15)
    assert len(counts) == 15
    assert counts.tolist() == pytest.approx([8000 / 15] * 15, rel=0.2)
    assert all(len(set(row.tolist())) > 1 for y_and_x in drawn[:20] for row in y_and_x)


@pytest.mark.parametrize("alpha", [0.001, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_small_alpha_gives_numbers(alpha: float, kind: str) -> None:
    odds = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}
    for _ in range(300):
        images, targets = mix(*batch(3), **odds, alpha=alpha)
        assert images.isfinite().all()
        assert targets.sum(1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dtype_and_memory_format_stay_and_nothing_is_done_in_place(
    kind: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    images = torch.randn(5, 3, 12, 20).to(dtype=dtype, memory_format=memory_format)
    targets = soft_targets(torch.arange(5), 7, 0.1)
    before = images.clone(), targets.clone()
    odds = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}

    def mixed() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return mix(images, targets, **odds, alpha=1.0)

    ours, ours_targets = mixed()
    assert not torch.equal(ours, images)
    assert (ours.dtype, ours_targets.dtype) == (dtype, torch.float32)
    assert ours.shape == images.shape
    assert ours.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])
    with torch.autocast("cpu", torch.bfloat16):
        again = mixed()
    assert torch.equal(again[0], ours)
    assert torch.equal(again[1], ours_targets)


def test_the_seed_decides() -> None:
    arguments = batch(6, 16, 16)
    results = []
    for seed in (1, 1, *range(2, 12)):
        torch.manual_seed(seed)
        results.append(mix(*arguments, mixup=0.5, cutmix=0.5, alpha=1.0))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert len({images.sum().item() + targets[0, 0].item() for images, targets in results}) == 11
