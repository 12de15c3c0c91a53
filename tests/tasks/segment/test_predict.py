"""Predictions of segmenters: windows, views, pictures, and exported files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import qtvit
from qtvit.checkpoints import BEST, ModelInfo, save_model
from qtvit.deploy.export import export_model
from qtvit.tasks.segment import predict as segment_module
from qtvit.tasks.segment.draw import draw_segmentation
from qtvit.tasks.segment.masks import MaskClasses
from qtvit.tasks.segment.model import build
from qtvit.tasks.segment.predict import (
    Segmentation,
    SegmentPredictor,
    SegmentPreprocess,
    Views,
    mask_args,
    segment_pixels,
)
from qtvit_cli import main

Randomize = Callable[[nn.Module, int], nn.Module]
MEANING = MaskClasses(
    ("sky", "road", "car"), (5, 7, 9), (0,), ((0, 0, 250), (90, 90, 90), (250, 0, 0)), ignore_index=255
)
OWN = SegmentPreprocess((16, 20), None, False, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def colours(pixels: Tensor) -> Tensor:
    """A network that takes the brightest channel for the class."""
    return 4 * pixels


def noise(height: int, width: int) -> Tensor:
    """Pixels in which neighbours are alike."""
    coarse = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic")[0]


@pytest.mark.parametrize(
    "views", [Views(), Views(window=True), Views(flip=True), Views(window=True, flip=True), Views(window=False)]
)
def test_a_network_of_single_pixels_sees_the_same_in_all_views(views: Views) -> None:
    pixels = noise(97, 211)
    assert torch.equal(segment_pixels(colours, pixels, 3, OWN, views).long(), pixels.argmax(0))


def test_images_are_seen_at_the_size_of_training() -> None:
    """Each part of an image is resized for the network, by the same factor; labels are of the image's own pixels."""
    sizes: list[tuple[int, ...]] = []

    def network(pixels: Tensor) -> Tensor:
        sizes.append(tuple(pixels.shape[-2:]))
        return pixels

    half = SegmentPreprocess((16, 20), 48, False, OWN.mean, OWN.std)
    assert segment_pixels(network, noise(96, 210), 3, half).shape == (96, 210)
    assert sizes == [(48, 105)]
    sizes.clear()
    labels = segment_pixels(network, noise(96, 210), 3, half, Views(window=True))
    assert labels.shape == (96, 210)
    assert set(sizes) == {(16, 20)}
    sizes.clear()
    segment_pixels(network, noise(96, 210), 3, half, Views(scales=(0.5, 1.0, 1.5)))
    assert sizes == [(24, 52), (48, 105), (72, 158)]
    sizes.clear()
    segment_pixels(network, noise(96, 210), 3, half, Views(img_size=0))
    assert sizes == [(96, 210)]
    sizes.clear()
    segment_pixels(network, noise(9, 30), 3, half, fixed=True)
    assert set(sizes) == {(16, 20)}


def test_large_images_are_seen_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()

    def network(pixels: Tensor) -> Tensor:
        shapes.add(tuple(pixels.shape[-2:]))
        return pixels

    monkeypatch.setattr(segment_module, "MAX_WHOLE", 40 * 40)
    segment_pixels(network, noise(40, 40), 3, OWN)
    assert shapes == {(40, 40)}
    segment_pixels(network, noise(40, 41), 3, OWN)
    assert shapes == {(40, 40), (16, 20)}


def test_views_are_averaged_as_probabilities() -> None:
    """Two views disagree; the one that is surer wins, which of the logits' sums would be the other."""
    first, second = torch.tensor([2.0, 0.0, -9.0]), torch.tensor([-60.0, 0.0, -0.5])

    def network(pixels: Tensor) -> Tensor:
        mirrored = bool(pixels[0, 0, 0, 0] > pixels[0, 0, 0, -1])
        logits = second if mirrored else first
        return logits.reshape(1, 3, 1, 1).expand(1, 3, *pixels.shape[-2:])

    pixels = torch.linspace(0, 1, 8).expand(3, 8, 8)
    mean = (first.softmax(0) + second.softmax(0)) / 2
    assert (int(mean.argmax()), int((first + second).argmax())) == (0, 1)
    labels = segment_pixels(network, pixels, 3, OWN, Views(flip=True))
    assert labels.unique().tolist() == [0]


def test_bad_views() -> None:
    for options, message in [
        ({"scales": ()}, "scales must be numbers above 0, got none"),
        ({"scales": (1.0, -1.0)}, "scales must be numbers above 0, got 1.0, -1.0"),
        ({"img_size": -1}, "img_size must be 0 or more, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Views(**options)
    with pytest.raises(ValueError, match="several scales need a network for images of any size"):
        segment_pixels(colours, noise(20, 20), 3, OWN, Views(scales=(1.0, 2.0)), fixed=True)


def test_a_segmentation_in_pictures() -> None:
    found = Segmentation(np.array([[0, 0, 0], [2, 2, 0]], np.uint8), MEANING)
    assert found.shares() == {"sky": 4 / 6, "car": 2 / 6}
    assert np.asarray(found.index_image()).tolist() == [[5, 5, 5], [9, 9, 5]]
    assert found.color_image().getpixel((0, 1)) == (250, 0, 0)
    assert found.overlay(Image.new("RGB", (3, 2)), 0.5).getpixel((0, 0)) == (0, 0, 125)
    image = Image.new("RGB", (200, 60), (255, 255, 255))
    drawn = draw_segmentation(image, Segmentation(np.zeros((60, 200), np.uint8), MEANING))
    assert drawn.width == 200
    assert drawn.height > 60
    assert drawn.getpixel((100, 30)) == found.overlay(Image.new("RGB", (3, 2), "white")).getpixel((0, 0))
    assert (0, 0, 250) in {drawn.getpixel((x, y)) for x in range(200) for y in range(60, drawn.height)}


@pytest.fixture
def run(tiny: None, randomize: Randomize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small segmenter."""
    task_args = {"head": "light", "aux": True, "channels": 8, "drop_rate": 0.1, "masks": mask_args(MEANING)}
    model = randomize(build("qtvit_nano", {}, task_args), 0)
    preprocess: dict[str, Any] = {
        "size": [16, 20],
        "img_size": None,
        "window": False,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    info = ModelInfo("qtvit_nano", {}, list(MEANING.names), preprocess, task="segment", task_args=task_args)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run" / BEST, model.state_dict(), info)
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images of 30 x 37 pixels with masks, and classes.yaml."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for i in range(3):
            rng = np.random.default_rng([i, split == "val"])
            image = rng.integers(0, 256, (30, 37, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            mask = rng.choice([0, 5, 7, 9], (30, 37)).astype(np.uint8)
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    (root / "classes.yaml").write_text("names: {5: sky, 7: road, 9: car}\nignore: [0]\n")
    return root


def test_predictor(run: Path) -> None:
    predictor = qtvit.load(run)
    assert isinstance(predictor, SegmentPredictor)
    assert predictor.mask_classes == MEANING
    picture = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    one, two = predictor.predict([picture, Image.fromarray(picture)])
    assert np.array_equal(one.labels, two.labels)
    assert one.labels.shape == (31, 45)
    with torch.no_grad():
        pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        assert np.array_equal(one.labels, predictor.model(pixels)[0].argmax(0).numpy())


def test_exported_for_any_size(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--dynamic", "batch,hw", "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "100.00% of the pixels" in said
    assert "mIoU: " in said
    file = run / "model.onnx"
    images = sorted((data / "val" / "images").iterdir())
    exported, network = qtvit.load(file), qtvit.load(run)
    assert isinstance(exported, SegmentPredictor)
    assert isinstance(network, SegmentPredictor)
    for views in (Views(), Views(window=True), Views(flip=True, scales=(0.5, 1.0))):
        assert (exported.predict(images[0], views).labels == network.predict(images[0], views).labels).mean() > 0.999
    assert main(["predict", str(file), str(images[0]), "--save", "drawn"]) == 0
    assert "sky" in capsys.readouterr().out
    assert main(["eval", str(file), "--data", str(data)]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_exported_for_one_size(run: Path, data: Path, tmp_path: Path) -> None:
    """It sees images in windows of that size, smaller ones padded."""
    done = export_model(run, format="torch", dynamic=())
    assert done.report.cases[0].num_pixels == 8 * 16 * 20
    exported, network = qtvit.load(done.files[0]), qtvit.load(run)
    assert isinstance(exported, SegmentPredictor)
    assert isinstance(network, SegmentPredictor)
    picture = data / "val" / "images" / "0.png"
    windows = network.predict(picture, Views(window=True)).labels
    assert (exported.predict(picture).labels == windows).mean() > 0.999
    assert exported.predict(np.zeros((9, 50, 3), np.uint8)).labels.shape == (9, 50)


def test_int8_with_its_mean_iou(run: Path, data: Path) -> None:
    images = str(data / "train" / "images")
    done = export_model(run, precision="int8", calibration=images, data=str(data), max_drop=100)
    assert done.report.score == "mIoU"
    assert done.report.accuracy is not None
    assert any(line.startswith("mIoU: ") for line in done.report.lines())
