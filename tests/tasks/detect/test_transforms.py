from typing import Any

import pytest
import torch
from torchvision import tv_tensors

from qtvit.data.sampling import seed_everywhere
from qtvit.tasks.detect.transforms import DetectionTransform, RandomZoom

HEIGHT, WIDTH = 40, 60


def example(*boxes: tuple[int, int, int, int]) -> tuple[Any, dict[str, Any]]:
    """White rectangles on black, so that image, boxes and masks can be compared."""
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
        image[:, top:bottom, left:right] = 255
    frame = {"format": "XYXY", "canvas_size": (HEIGHT, WIDTH)}
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), **frame),
        "labels": torch.arange(1, len(boxes) + 1),
        "masks": tv_tensors.Mask(masks),
        "image_id": 5,
    }
    return tv_tensors.Image(image), target


def extents(masks: torch.Tensor) -> list[list[int]]:
    found = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        found.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return found


def test_a_flip_moves_all_together() -> None:
    image, target = DetectionTransform(hflip=1)(*example((10, 5, 25, 30), (40, 0, 60, 10)))
    assert target["boxes"].tolist() == [[35, 5, 50, 30], [0, 0, 20, 10]] == extents(target["masks"])
    assert torch.equal(image[0] > 0, target["masks"].any(0))
    assert target["labels"].tolist() == [1, 2]
    assert target["image_id"] == 5


@pytest.mark.parametrize("zoom", [(0.5, 0.5), (2.0, 2.0), (0.4, 2.5)])
def test_a_zoom_moves_all_together(zoom: tuple[float, float]) -> None:
    sizes = set()
    for seed in range(20):
        seed_everywhere(seed)
        image, target = DetectionTransform(zoom=zoom)(*example((10, 5, 25, 30), (40, 0, 60, 10)))
        assert image.shape[-2:] == target["masks"].shape[-2:]
        sizes.add(tuple(image.shape[-2:]))
        assert target["boxes"].tolist() == extents(target["masks"])
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        white = (image == 255).all(0)
        covered = torch.zeros_like(white)
        for mask in target["masks"]:
            covered |= mask.bool()
        assert torch.equal(white & covered, covered)
        assert int((white & ~covered).sum()) == 0
    assert sizes == {(80, 120)} if zoom == (0.5, 0.5) else {(20, 30)} if zoom == (2.0, 2.0) else len(sizes) > 10


def test_a_frame_has_the_mean_colour() -> None:
    image, _ = RandomZoom(0.5, 0.5)(*example((0, 0, WIDTH, HEIGHT)))
    frame = image.as_subclass(torch.Tensor).flatten(1)[:, (image != 255).any(0).flatten()]
    assert frame.unique(dim=1).tolist() == [[123], [116], [103]]
    assert frame.shape[1] == 80 * 120 - HEIGHT * WIDTH


def test_objects_that_are_cut_away_are_dropped() -> None:
    kept = set()
    for seed in range(30):
        seed_everywhere(seed)
        _, target = DetectionTransform(hflip=0, zoom=(3, 3))(*example((0, 0, 4, 4), (50, 30, 60, 40)))
        kept.add(tuple(target["labels"].tolist()))
    assert kept == {(), (1,), (2,)}


def test_without_objects() -> None:
    _, target = DetectionTransform(hflip=1, photometric=1, zoom=(0.5, 2))(*example())
    assert target["boxes"].shape == (0, 4)


def test_only_pixels_change_photometrically() -> None:
    before = example((10, 5, 25, 30))
    before[0].random_(0, 256)
    image, target = DetectionTransform(hflip=0, photometric=1)(before[0].clone(), before[1])
    assert not torch.equal(image, before[0])
    assert target["boxes"].tolist() == [[10, 5, 25, 30]]


def test_random_numbers_follow_from_the_global_state() -> None:
    transform = DetectionTransform(photometric=0.5, zoom=(0.5, 2))
    images = []
    for seed in (1, 1, 2):
        seed_everywhere(seed)
        images.append(transform(*example((10, 5, 25, 30)))[0])
    assert torch.equal(images[0], images[1])
    assert images[0].shape != images[2].shape or not torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, "hflip must be from 0 to 1, got 1.5"),
        ({"photometric": -1}, "photometric must be from 0 to 1, got -1"),
        ({"zoom": (2, 1)}, r"zoom must be two factors above 0, the smaller one first, got \(2, 1\)"),
        ({"zoom": (0, 1)}, "zoom must be two factors above 0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionTransform(**options)
