"""A trained model that is exported quickly, and images for it."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from qtvit.checkpoints import BEST, ModelInfo, save_model
from qtvit.deploy.export import Export, export_model
from qtvit.models import ARCHITECTURES, Architecture, Stage, build_model

Randomize = Callable[[nn.Module, int], nn.Module]
CLASSES = ["naïve <b>", 'quo"ted', "third"]
SIZE = (16, 20)


TINY = Architecture(
    (Stage(8, 1, "ds", first="conv", stride=1), Stage(16, 1, "attn", expand=2, fewer_norm=True)),
    head_dim=8,
    head_widths=(16, 16),
    img_size=32,
    conv_init="kaiming",
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes qtvit_nano a network of one attention block."""
    monkeypatch.setitem(ARCHITECTURES, "qtvit_nano", TINY)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, randomize: Randomize) -> Callable[[str, str], Export]:
    """Exports the tiny model in a format and precision, which takes seconds, once; it lies in a run folder."""

    @functools.cache
    def export(format: str, precision: str) -> Export:
        folder = tmp_path_factory.mktemp(f"{format}-{precision}")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(ARCHITECTURES, "qtvit_nano", TINY)
            save_tiny(folder / BEST, randomize)
            return export_model(folder, format=format, precision=precision)

    return export


@pytest.fixture
def tiny_run(tiny: None, tmp_path: Path, randomize: Randomize) -> Path:
    """The run folder of a tiny model with weights that matter, for images of 16 x 20."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_tiny(folder / BEST, randomize)
    return folder


def save_tiny(path: Path, randomize: Randomize, **model_args: object) -> None:
    """Write the model file of a tiny model."""
    args = {"num_classes": len(CLASSES), "img_size": list(SIZE), **model_args}
    info = ModelInfo("qtvit_nano", args, CLASSES, {"size": list(SIZE), "crop_pct": 0.9})
    save_model(path, randomize(build_model("qtvit_nano", **args), 0).state_dict(), info)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Coloured noise, four images of each class."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(["a", "b", "c"]):
        for i in range(4):
            path = tmp_path / "photos" / CLASSES[label] / f"{name}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            level = generator.uniform(0, 255, (5, 6, 3)).astype(np.uint8)
            Image.fromarray(level).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"
