"""Finding the folders and images of a data set, for any kind of labels."""

from collections.abc import Sequence
from pathlib import Path

from .digits import DIGITS, load_digits
from .images import ImageSource, find_images
from .shards import is_packed, read_index
from .split import stratified_split

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test")


def data_folder(data: str, sample: str = f"'{DIGITS}' for the built-in data") -> Path:
    """The folder ``data``; the error if there is none proposes ``sample`` data."""
    root = Path(data)
    if root.is_file():
        raise ValueError(f"{data}: a file, where a folder of images is expected; unpack it if it is an archive")
    if not root.is_dir():
        raise FileNotFoundError(f"{data}: no such folder (give a folder of images, or {sample})")
    return root


def find_train_folder(root: Path) -> Path | None:
    """The first of `TRAIN_FOLDERS` in ``root``, in upper or lower case."""
    return _find_folder(root, TRAIN_FOLDERS)


def find_val_folder(root: Path) -> Path | None:
    """The first of `VAL_FOLDERS` in ``root``, in upper or lower case."""
    return _find_folder(root, VAL_FOLDERS)


def _find_folder(root: Path, names: Sequence[str]) -> Path | None:
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def all_images(data: str) -> list[ImageSource]:
    """All images in the folder ``data``, packed or not, or the images of "digits" that are held out by default.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, it has no images, or a shard is missing or damaged.
    """
    if data == DIGITS:
        return [image for image, _ in stratified_split(load_digits()[1], val_fraction=0.2, seed=0)[1]]
    root = data_folder(data)
    if not is_packed(root):
        images: list[ImageSource] = list(find_images(root))
        if not images:
            raise ValueError(f"{data}: no images in this folder")
        return images
    splits = read_index(root).splits.values()
    for split in splits:
        if damage := split.damage(root):
            raise damage[0]
    return [image for split in splits for image in split.sources(root)]
