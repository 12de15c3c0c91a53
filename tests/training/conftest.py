from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from torch import nn

from qtvit.models import Architecture, QTViT
from qtvit_cli import main

from .fit import NUM_CLASSES

COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def draw(path: Path, color: tuple[int, int, int], offset: int) -> None:
    """A picture of 40 x 30 that shows a box of one colour on grey."""
    image = Image.new("RGB", (40, 30), (128, 128, 128))
    ImageDraw.Draw(image).rectangle((offset, offset, offset + 20, offset + 15), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write to runs/ in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def network(
    tiny_architectures: Mapping[str, Architecture], randomize: Callable[[nn.Module, int], nn.Module]
) -> Callable[..., QTViT]:
    """Builds the shrunken nano, with weights under which every part of it matters."""

    def build(**args: Any) -> QTViT:
        return randomize(QTViT(tiny_architectures["nano"], num_classes=NUM_CLASSES, img_size=16, **args), 0)

    return build


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes of ten images each, without a val part."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for name, color in COLORS.items():
        for i in range(10):
            draw(root / name / f"{i}.png", tuple(value + 3 * i for value in color), i)
    return root


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training on ``photos``, made at the command line."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 12x16 --epochs 12 --batch-size 8 --lr 0.003"
    assert main([*argv.split(), "--num-workers", "0", "--num-threads", "1", "--output", str(folder)]) == 0
    return folder
