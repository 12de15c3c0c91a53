"""Whether a detector and its file find the same: what counts as the same, and what is said."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qtvit.deploy.runtimes import Runtime
from qtvit.tasks.detect.export import DetectorReport, check_detector

BOX = (10.0, 10.0, 30.0, 30.0)


class Finds(Runtime):
    """Finds the same ``(box, label, score)`` in every image."""

    def __init__(self, *objects: tuple[tuple[float, ...], int, float]) -> None:
        self.found = {
            "boxes": torch.tensor([box for box, _, _ in objects]).view(-1, 4),
            "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
            "scores": torch.tensor([score for _, _, score in objects]),
        }
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        raise AssertionError

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        self.sizes.append(tuple(image.shape))
        return self.found


def check(network: Runtime, file: Runtime) -> DetectorReport:
    return check_detector(network, file, [torch.zeros(3, 40, 50), torch.zeros(3, 60, 20)])


def test_equal_objects_and_uncertain_ones_do_not_count_against_a_file() -> None:
    network = Finds((BOX, 1, 0.9), ((0, 0, 9, 9), 2, 0.305), (BOX, 2, 0.2))
    file = Finds(((0, 0, 9, 9), 2, 0.298), ((10.1, 10.0, 30.0, 30.0), 1, 0.905))
    report = check(network, file)
    assert network.sizes == file.sizes == [(3, 40, 50), (3, 50, 40), (3, 60, 20), (3, 20, 60)]
    assert (report.num_images, report.num_objects, report.num_missing, report.num_surplus) == (4, 8, 0, 0)
    assert report.problem() is None
    assert report.lines() == [
        "4 images of 60x20 to 50x40 px, 8 objects with a score of 0.3 or more: 0 not found by the file, "
        "0 found by it alone"
    ]


@pytest.mark.parametrize(
    ("other", "missing", "surplus"),
    [
        ((BOX, 2, 0.9), 4, 4),  # another class
        (((10, 10, 30, 32.0), 1, 0.9), 4, 4),  # an IoU of 0.91
        ((BOX, 1, 0.88), 4, 4),  # another score
        ((BOX, 1, 0.25), 4, 0),
        (None, 4, 0),
    ],
)
def test_other_objects_do(other: Any, missing: int, surplus: int) -> None:
    report = check(Finds((BOX, 1, 0.9)), Finds(other) if other else Finds())
    assert (report.num_missing, report.num_surplus) == (missing, surplus)
    assert report.problem() == (
        f"of 4 objects, {missing} are not found by it, and {surplus} others are; 99% have to be the same"
    )


def test_a_file_that_finds_what_is_not_there_fails() -> None:
    assert check(Finds(), Finds((BOX, 1, 0.9))).problem()


def test_that_nothing_was_found_is_said() -> None:
    report = check(Finds(), Finds((BOX, 1, 0.1)))
    assert report.problem() is None
    assert "nothing found in any, by neither; --data or --calibration" in report.lines()[0]


def test_one_object_may_differ() -> None:
    """Rounding decides which of two overlapping proposals is kept."""
    sizes = ((20, 60), (40, 50))
    assert DetectorReport(sizes, 4, 32, 1, 1).problem() is None
    assert DetectorReport(sizes, 4, 32, 2, 1).problem() is not None
    assert DetectorReport(sizes, 4, 0, 0, 2).problem() is not None
    assert DetectorReport(sizes, 400, 1000, 10, 10).problem() is None
    assert DetectorReport(sizes, 400, 1000, 11, 10).problem() is not None
