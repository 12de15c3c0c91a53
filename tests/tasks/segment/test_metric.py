import pytest
import torch
from torch import Tensor

from qtvit.tasks.segment.metric import SegmentationConfusion
from qtvit.tasks.segment.scores import RegionScores, SegmentationScores

CLASSES = ("sky", "road", "car", "bus", "dog")

# Eight pixels of sky, road and car; bus is only predicted, dog is nowhere; the last two pixels are of no class.
LABELS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 255, 255]])
PREDICTED = torch.tensor([[0, 0, 1, 1, 1, 2, 1, 3, 0, 4]])


@pytest.fixture
def metric() -> SegmentationConfusion:
    return SegmentationConfusion(5)


def test_by_hand(metric: SegmentationConfusion) -> None:
    metric.update(PREDICTED, LABELS)
    scores = metric.scores(CLASSES)
    assert scores.confusion.tolist() == [
        [2, 1, 0, 0, 0],
        [0, 2, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert scores.per_class() == [
        RegionScores("sky", 3, 66.6667, 66.6667, 100.0, "road", 1),
        RegionScores("road", 2, 50.0, 100.0, 50.0, None, 0),
        RegionScores("car", 3, 33.3333, 33.3333, 100.0, "road", 1),
        RegionScores("bus", 0, 0.0, None, 0.0, None, 0),
        RegionScores("dog", 0, None, None, None, None, 0),
    ]
    assert scores.metrics() == {
        "miou": 37.5,  # (2/3 + 1/2 + 1/3 + 0) / 4
        "macc": 66.6667,  # (2/3 + 1 + 1/3) / 3
        "aacc": 62.5,  # 5 / 8
        "num_images": 1,
        "num_pixels": 8,
    }


def test_images_of_several_sizes_add_up(metric: SegmentationConfusion) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for size in ((2, 97, 211), (1, 3, 5), (7, 9)):
        predicted = torch.randint(0, 5, size, generator=generator)
        labels = torch.randint(0, 6, size, generator=generator)
        pairs.append((predicted.to(torch.uint8), torch.where(labels == 5, 255, labels)))
        metric.update(*pairs[-1])
    scores = metric.scores(CLASSES)
    expected = torch.zeros(5, 5, dtype=torch.long)
    for predicted, labels in pairs:
        for i in range(5):
            for j in range(5):
                expected[i, j] += int(((labels == i) & (predicted == j)).sum())
    assert torch.equal(scores.confusion, expected)
    assert scores.num_images == 4


@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_what_is_predicted_where_nothing_is_labelled_does_not_matter(ignore_index: int) -> None:
    labels = torch.randint(0, 5, (1, 20, 30))
    labels[:, :7] = ignore_index
    results = []
    for fill in range(5):
        predicted = torch.full_like(labels, 2)
        predicted[labels == ignore_index] = fill
        metric = SegmentationConfusion(5, ignore_index)
        metric.update(predicted, labels)
        results.append(metric.scores(CLASSES).confusion)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].sum() == 13 * 30


def test_nothing_labelled(metric: SegmentationConfusion) -> None:
    metric.update(torch.zeros(1, 4, 4, dtype=torch.long), torch.full((1, 4, 4), 255))
    assert metric.scores(CLASSES).metrics() == {"miou": 0, "macc": 0, "aacc": 0, "num_images": 1, "num_pixels": 0}


def test_processes_add_up() -> None:
    """What two processes count is gathered as torchmetrics does it, without the processes."""
    metrics = [SegmentationConfusion(5) for _ in range(2)]
    metrics[0].update(PREDICTED, LABELS)
    for _ in range(2):
        metrics[1].update(LABELS.clamp_max(4), LABELS)

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        name = "num_images" if state.ndim == 0 else "confusion"
        return [state, getattr(metrics[1], name)]

    local = metrics[0].confusion.clone()
    metrics[0].dist_sync_fn = gather
    metrics[0].distributed_available_fn = lambda: True
    scores = metrics[0].scores(CLASSES)
    assert scores.num_images == 3
    assert scores.confusion.diagonal().tolist() == [2 + 6, 2 + 4, 1 + 6, 0, 0]
    assert torch.equal(metrics[0].confusion, local)


def test_a_perfect_score() -> None:
    assert SegmentationScores(("a", "b"), torch.tensor([[5, 0], [0, 3]]), 1).metrics()["miou"] == 100
