"""Where a segmentation data set keeps images and masks, and which mask is of which image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qtvit.data.folders import TRAIN_FOLDERS, VAL_FOLDERS
from qtvit.data.images import find_images

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations")
CITYSCAPES_MASK_ENDINGS = ("_gtFine_labelTrainIds", "_gtFine_labelIds", "_gtFine_color")
MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_L", *CITYSCAPES_MASK_ENDINGS)
"""What the name of a mask may have beyond that of its image."""
IMAGE_ENDINGS = ("", "_leftImg8bit")
"""What the image may have where the mask has that."""

EXPECTED = (
    "expected train/images/, train/masks/, val/images/ and val/masks/, or images/train/, masks/train/, images/val/ and "
    "masks/val/"
)


class SegmentationSample(NamedTuple):
    """An image and its mask.

    Attributes:
        image, mask: their files.
        name: where the image is in the folder of its split's images, with slashes.
    """

    image: Path
    mask: Path
    name: str


@dataclass(frozen=True)
class SegmentationLayout:
    """The files of a data set.

    Attributes:
        root: its folder.
        splits: "train" and "val", with the images that have a mask.
        ade20k: whether it is laid out as ADE20K: folders annotations/training and annotations/validation.
        problems: heading and entries, as in a `qtvit.data.problems.ProblemReport`.
    """

    root: Path
    splits: dict[str, list[SegmentationSample]]
    ade20k: bool
    problems: dict[str, list[str]] = field(default_factory=dict)


def read_layout(root: Path) -> SegmentationLayout:
    """Find images and masks below ``root``, in one of the layouts that docs/segmentation.md shows.

    Raises:
        ValueError: it is in none of them, or in several.
    """
    folders, ade20k = _find_folders(root)
    layout = SegmentationLayout(root, {}, ade20k)
    for split, (images, masks) in folders.items():
        layout.splits[split] = _pair(images, masks, layout.problems)
    return layout


def _find_folders(root: Path) -> tuple[dict[str, tuple[Path, Path]], bool]:
    """Folders of images and masks by split, and whether they are called as ADE20K's."""
    train, val = _only(root, TRAIN_FOLDERS), _first(root, VAL_FOLDERS)
    images, masks = _only(root, IMAGE_FOLDERS), _only(root, MASK_FOLDERS)
    if train is not None and images is not None:
        raise ValueError(f"{root}: has both {train.name}/ and {images.name}/; {EXPECTED}")
    if train is not None:
        if val is None:
            raise ValueError(f"{root}: has {train.name}/ but none of {_names(VAL_FOLDERS)}")
        return {
            split: (
                _needed(folder, _only(folder, IMAGE_FOLDERS), IMAGE_FOLDERS),
                _needed(folder, _only(folder, MASK_FOLDERS), MASK_FOLDERS),
            )
            for split, folder in (("train", train), ("val", val))
        }, False
    if images is None or masks is None:
        raise ValueError(f"{root}: {EXPECTED}")
    found = {}
    for split, names in (("train", TRAIN_FOLDERS), ("val", VAL_FOLDERS)):
        pick = _only if split == "train" else _first
        found[split] = (_needed(images, pick(images, names), names), _needed(masks, pick(masks, names), names))
    called = (masks.name.lower(), *(folder.name.lower() for _, folder in found.values()))
    return found, called == ("annotations", "training", "validation")


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder in ``folder`` that has the first possible of ``names``, in any case."""
    present = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return next((present[name] for name in names if name in present), None)


def _only(folder: Path, names: Sequence[str]) -> Path | None:
    """As `_first`, where there may be one only."""
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in names]
    if len(found) > 1:
        raise ValueError(f"{folder}: has both {found[0].name}/ and {found[1].name}/; keep one")
    return found[0] if found else None


def _needed(parent: Path, folder: Path | None, names: Sequence[str]) -> Path:
    if folder is None:
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


def _by_name(folder: Path, known: Sequence[str] | dict[str, Path], problems: dict[str, list[str]]) -> dict[str, Path]:
    """The pictures below ``folder`` by path without suffix, and with another ending if only that is a ``known`` one."""
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
