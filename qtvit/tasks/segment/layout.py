"""Where a segmentation data set keeps images and masks, and which mask belongs to which image."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qtvit.data.folders import TRAIN_FOLDERS, VAL_FOLDERS
from qtvit.data.images import find_images

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations")
CITYSCAPES_MASK_ENDINGS = ("_gtFine_labelTrainIds", "_gtFine_labelIds", "_gtFine_color")
MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_L", *CITYSCAPES_MASK_ENDINGS)
"""What a mask's name may have after the name of its image."""
IMAGE_ENDINGS = ("", "_leftImg8bit")
"""What the image's name may have in its place."""

EXPECTED = (
    "expected train/images/, train/masks/, val/images/ and val/masks/, or images/train/, masks/train/, images/val/ and "
    "masks/val/"
)


class SegmentationSample(NamedTuple):
    """The files of an image and its mask; ``name`` is the image's path in its split's image folder, with slashes."""

    image: Path
    mask: Path
    name: str


@dataclass(frozen=True)
class SegmentationLayout:
    """The files of a data set."""

    root: Path
    splits: dict[str, list[SegmentationSample]]  # the images that have a mask, of "train" and "val"
    ade20k: bool  # whether the folders are named as ADE20K's: annotations/training and annotations/validation
    problems: dict[str, list[str]] = field(default_factory=dict)  # entries by heading


def read_layout(root: Path) -> SegmentationLayout:
    """Find images and masks below ``root``, in one of the layouts that docs/segmentation.md shows.

    Raises:
        ValueError: the files are in none of these layouts, or in several.
    """
    folders, ade20k = _find_folders(root)
    problems: dict[str, list[str]] = {}
    splits = {split: _pair(images, masks, problems) for split, (images, masks) in folders.items()}
    return SegmentationLayout(root, splits, ade20k, problems)


def _find_folders(root: Path) -> tuple[dict[str, tuple[Path, Path]], bool]:
    """Folders of images and masks by split, and whether they are named as ADE20K's."""
    train, val = _only(root, TRAIN_FOLDERS), _first(root, VAL_FOLDERS)
    images, masks = _only(root, IMAGE_FOLDERS), _only(root, MASK_FOLDERS)
    if train is not None and images is not None:
        raise ValueError(f"{root}: has both {train.name}/ and {images.name}/; {EXPECTED}")
    if train is not None:
        if val is None:
            raise ValueError(f"{root}: has {train.name}/ but none of {_names(VAL_FOLDERS)}")
        return {
            split: (_needed(folder, IMAGE_FOLDERS), _needed(folder, MASK_FOLDERS))
            for split, folder in (("train", train), ("val", val))
        }, False
    if images is None or masks is None:
        raise ValueError(f"{root}: {EXPECTED}")
    found = {"train": (_needed(images, TRAIN_FOLDERS), _needed(masks, TRAIN_FOLDERS))}
    found["val"] = _needed(images, VAL_FOLDERS, several=True), _needed(masks, VAL_FOLDERS, several=True)
    called = (masks.name.lower(), *(folder.name.lower() for _, folder in found.values()))
    return found, called == ("annotations", "training", "validation")


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder in ``folder`` with the first of ``names`` that there is, in upper or lower case."""
    present = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return next((present[name] for name in names if name in present), None)


def _only(folder: Path, names: Sequence[str]) -> Path | None:
    """As `_first`, but an error if there are several such folders."""
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in names]
    if len(found) > 1:
        raise ValueError(f"{folder}: has both {found[0].name}/ and {found[1].name}/; keep one")
    return found[0] if found else None


def _needed(parent: Path, names: Sequence[str], several: bool = False) -> Path:
    """As `_first` if there may be ``several``, else as `_only`, but an error if there is no such folder."""
    if (folder := (_first if several else _only)(parent, names)) is None:
        raise ValueError(f"{parent}: has none of {_names(names)}")
    return folder


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"{name}/" for name in names)


def _pair(images: Path, masks: Path, problems: dict[str, list[str]]) -> list[SegmentationSample]:
    """The images with their masks, which have the same path but for suffix, `MASK_ENDINGS` and `IMAGE_ENDINGS`."""
    image_files = _by_name(images, (), problems)
    mask_files = _by_name(masks, image_files, problems)
    if not image_files:
        problems.setdefault("no images", []).append(f"{images}: no images")
    problems.setdefault("images without a mask", []).extend(
        f"{path}: no mask, such as {masks / name}.png" for name, path in image_files.items() if name not in mask_files
    )
    problems.setdefault("masks without an image", []).extend(
        f"{path}: no image of this name in {images}" for name, path in mask_files.items() if name not in image_files
    )
    return [
        SegmentationSample(path, mask_files[name], path.relative_to(images).as_posix())
        for name, path in image_files.items()
        if name in mask_files
    ]


def _by_name(folder: Path, known: Container[str], problems: dict[str, list[str]]) -> dict[str, Path]:
    """The image files below ``folder`` by path without suffix, with the ending changed if only that gives a known name.

    Args:
        folder: to look into.
        known: names of the images that the files may be masks of.
        problems: files of the same name are reported here.
    """
    found: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in known:
            stems = [name.removesuffix(ending) for ending in MASK_ENDINGS if name.endswith(ending)]
            images = [stem + ending for stem in stems for ending in IMAGE_ENDINGS]
            name = next((image for image in images if image in known), name)
        if name in found:
            problems.setdefault("files of one name", []).append(f"{path}: {found[name].name} has the same name")
        else:
            found[name] = path
    return found
