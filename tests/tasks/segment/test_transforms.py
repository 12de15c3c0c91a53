import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qtvit.data.sampling import SeededDataset
from qtvit.tasks.segment.transforms import SegmentationEvalTransform, SegmentationTrainTransform

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PLAIN = {**IDENTITY, "hflip": 0.0, "photometric": False, "max_class_ratio": 1.0}


def scene(height: int = 97, width: int = 211) -> tuple[Image.Image, Tensor]:
    """A mask of blocks, and an image whose red channel is 20 times the label."""
    labels = (torch.arange(height)[:, None] // 16 + torch.arange(width) // 16) % 12
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 20 * labels.numpy()
    return Image.fromarray(pixels), labels.short()


def labels_of(pixels: Tensor) -> Tensor:
    """What the red channel says."""
    return (pixels[0] * 255 / 20).round().long()


def test_image_and_labels_stay_together() -> None:
    transform = SegmentationTrainTransform((64, 96), photometric=False, **IDENTITY)
    shares = []
    for _ in range(20):
        pixels, labels = transform(*scene())
        assert (pixels.shape, pixels.dtype) == ((3, 64, 96), torch.float32)
        assert (labels.shape, labels.dtype) == ((64, 96), torch.int64)
        assert type(pixels) is type(labels) is Tensor
        shown = labels != 255
        assert set(labels[shown].tolist()) <= set(range(12))
        shares.append(float((labels_of(pixels) == labels)[shown].float().mean()))
    assert min(shares) > 0.75  # borders of blocks are blurred
    assert max(shares) > 0.9


def test_scale_1_of_the_own_size_is_a_plain_crop() -> None:
    image, labels = scene()
    transform = SegmentationTrainTransform((64, 96), base_size=0, scale=(1, 1), **PLAIN)
    pixels, cropped = transform(image, labels)
    assert torch.equal(labels_of(pixels), cropped)
    places = [
        (y, x)
        for y in range(97 - 64 + 1)
        for x in range(211 - 96 + 1)
        if torch.equal(labels[y : y + 64, x : x + 96].long(), cropped)
    ]
    assert places


def test_labels_are_those_at_the_centres_of_pixels() -> None:
    labels = torch.randint(0, 9, (96, 210), dtype=torch.int16)
    _, small = SegmentationTrainTransform((32, 70), scale=(1, 1), **PLAIN)(Image.new("RGB", (210, 96)), labels)
    assert torch.equal(small, labels[1::3, 1::3].long())


def test_padding() -> None:
    mean = (0.2, 0.4, 0.6)
    transform = SegmentationTrainTransform(
        (300, 300), base_size=0, scale=(1, 1), hflip=0, photometric=False, ignore_index=-1, mean=mean, std=(1, 1, 1)
    )
    pixels, labels = transform(*scene())
    assert (labels[97:] == -1).all()
    assert (labels[:, 211:] == -1).all()
    assert torch.equal(labels[:97, :211], scene()[1].long())
    assert pixels[:, 97:].abs().max() < 0.5 / 255 + 1e-6  # the mean colour, to a grey level


@pytest.mark.parametrize(
    ("base_size", "scale", "shown"), [(None, 1.0, 64), (128, 1.0, 128), (64, 0.5, 32), (0, 1.0, 97)]
)
def test_the_shorter_side_at_scale_1(base_size: int | None, scale: float, shown: int) -> None:
    transform = SegmentationTrainTransform((64, 600), base_size=base_size, scale=(scale, scale), **PLAIN)
    _, labels = transform(*scene())
    visible = labels != 255
    assert int(visible.any(1).sum()) == min(shown, 64)
    assert int(visible.any(0).sum()) == min(round(211 * shown / 97), 600)


def test_scales_are_drawn_from_the_range() -> None:
    torch.manual_seed(0)
    transform = SegmentationTrainTransform((400, 400), base_size=97, scale=(0.5, 2), **PLAIN)
    heights = [int((transform(*scene())[1] != 255).any(1).sum()) for _ in range(60)]
    assert min(heights) < 60 < 160 < max(heights)
    assert 48 <= min(heights) <= max(heights) <= 194


def test_crops_of_one_class_are_drawn_again() -> None:
    labels = torch.zeros(100, 400, dtype=torch.int16)
    labels[:, 320:] = 1
    labels[:60] = 255  # counts for no class
    image = Image.new("RGB", (400, 100))

    def share_mixed(max_class_ratio: float) -> float:
        torch.manual_seed(0)
        transform = SegmentationTrainTransform(
            (100, 100), scale=(1, 1), **{**PLAIN, "max_class_ratio": max_class_ratio}
        )
        crops = [transform(image, labels)[1] for _ in range(60)]
        return sum(0.25 <= float((crop == 1).sum() / (crop != 255).sum()) <= 0.75 for crop in crops) / len(crops)

    assert share_mixed(1.0) < 0.3
    assert share_mixed(0.75) > 0.7


def test_flips_and_colours() -> None:
    image, labels = scene()
    flipped = SegmentationTrainTransform((97, 211), scale=(1, 1), **{**PLAIN, "hflip": 1.0})(image, labels)
    assert torch.equal(flipped[1], labels.flip(1).long())
    assert torch.equal(labels_of(flipped[0]), flipped[1])
    distort = SegmentationTrainTransform((97, 211), scale=(1, 1), **{**PLAIN, "photometric": True})
    results = [distort(image, labels) for _ in range(8)]
    assert len({result[0].sum().item() for result in results}) > 3
    assert all(torch.equal(result[1], labels.long()) for result in results)


def test_random_numbers_follow_from_the_sample() -> None:
    class Scenes(torch.utils.data.Dataset):
        transform = SegmentationTrainTransform((64, 64))

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.transform(*scene())

    dataset = SeededDataset([Scenes()], seed=3)
    first = dataset[(0, 1, 0)]
    torch.rand(5)
    again, other = dataset[(0, 1, 0)], dataset[(1, 1, 0)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_evaluation() -> None:
    image, labels = scene()
    pixels, kept = SegmentationEvalTransform()(image, labels)
    assert (pixels.shape, pixels.dtype) == ((3, 97, 211), torch.float32)
    assert torch.equal(kept, labels.long())
    plain = SegmentationEvalTransform(**IDENTITY).image(image)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(pixels, (plain - mean) / std, atol=1e-5)
    assert abs(float(plain.mean()) - np.asarray(image).mean() / 255) < 0.01
