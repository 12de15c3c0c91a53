"""Images with one label each: from folders, or the embedded digits."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .images import ImageSource, find_images, open_image

Sample = tuple[ImageSource, int]
VAL_FOLDERS = ("val", "valid", "validation", "test")
DIGITS = "digits"


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images in two splits; labels index ``classes``."""

    name: str
    classes: tuple[str, ...]
    train: list[Sample]
    val: list[Sample]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Samples read with `open_image`, then transformed."""

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.samples[index]
        return self.transform(open_image(source)), label


def load_labelled_images(data: str, *, val_fraction: float = 0.2, seed: int = 0) -> LabelledImages:
    """Read ``data``, which is "digits" or a folder.

    A folder holds either ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (or valid, validation, test), or ``CLASS/*.jpg``
    alone, of which the same ``val_fraction`` of every class is then held out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images, or not in one of these layouts, or the classes of the two splits do not match.
    """
    if data == DIGITS:
        return _digits(val_fraction, seed)
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{data}: no such folder (give a folder of images, or '{DIGITS}' for the built-in data)"
        )
    if not (root / "train").is_dir():
        classes, samples = _read_training_folder(root)
        train, val = stratified_split(samples, val_fraction, seed)
        return LabelledImages(root.resolve().name, classes, train, val)

    val_root = next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    if val_root is None:
        raise ValueError(f"{root}: has train/ but none of {', '.join(f'{name}/' for name in VAL_FOLDERS)}")
    classes, train = _read_training_folder(root / "train")
    val = read_split(val_root, classes)
    return LabelledImages(root.resolve().name, classes, train, val)


def read_split(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """The images of ``folder/CLASS/``, labelled by the given classes; a class folder that is not among them is an
    error.
    """
    found, samples = _read_class_folders(folder)
    if foreign := [name for name in found if name not in classes]:
        raise ValueError(f"{folder}: class folders that the model or train/ does not have: {', '.join(foreign[:5])}")
    return [(path, classes.index(found[label])) for path, label in samples]


def stratified_split(samples: Sequence[Sample], val_fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out ``val_fraction`` of every class (at least one image, at most all but one) into a second list."""
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    rng = random.Random(seed)
    train: list[Sample] = []
    val: list[Sample] = []
    for label in sorted(by_class):
        members = by_class[label]
        if len(members) < 2:
            raise ValueError(f"{members[0][0]!s}: the only image of its class; two or more are needed to hold some out")
        rng.shuffle(members)
        num_val = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val += members[:num_val]
        train += members[num_val:]
    return train, val


def _read_training_folder(root: Path) -> tuple[tuple[str, ...], list[Sample]]:
    classes, samples = _read_class_folders(root)
    if len(classes) == 1:
        raise ValueError(f"{root}: one class only ({classes[0]}); there is nothing to tell apart")
    return classes, samples


def _read_class_folders(root: Path) -> tuple[tuple[str, ...], list[Sample]]:
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        files = find_images(root / name)
        if not files:
            raise ValueError(f"{root / name}: no images in this class folder (looked for {', '.join(IMG_EXTENSIONS)})")
        samples += [(path, label) for path in files]
    if not classes:
        raise ValueError(f"{root}: no class folders; expected {root.name}/CLASS/*.jpg")
    return classes, samples


def _digits(val_fraction: float, seed: int) -> LabelledImages:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    samples: list[Sample] = [
        (Image.fromarray(image), int(label)) for image, label in zip(pixels, bunch.target, strict=True)
    ]
    train, val = stratified_split(samples, val_fraction, seed)
    return LabelledImages(DIGITS, tuple(str(name) for name in bunch.target_names), train, val)
